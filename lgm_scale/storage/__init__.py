"""Files: whole or absent on this machine, patient and checked in object storage. No torch.

`files` writes and hashes what lies on this machine, `transfer` moves one file from or to object
storage, `stores` holds many files under one root. Nothing slow is imported before it is needed.
"""
