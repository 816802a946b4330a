"""Resume state: what it holds, where it lies, and who may write it. No pickle anywhere.

Below `checkpoint.folder`:

    run.json                    whose folder this is: the run's id and configuration
    attempts/0003.json          one for each start of the run, in order
    ba00001500-a0003/           a state: step 1500, written by attempt 3
        rank-00000.safetensors  the weights, moments and average that a rank owns
        manifest.json           written last: without it, there is no state
"""
