"""Files: whole or absent on this machine, patient and checked in object storage. No torch.

`files` writes and hashes what lies on this machine, `clients` asks each kind of storage once,
`transfer` moves one file with patience, `stores` holds many files under one root. Nothing slow is
imported before it is needed.
"""
