"""Level 3: the decoder as mathematics; attention and reduction are handed in. Never imports torch.distributed or comm.

`families` and `hub` need no torch, so that a front end may read a ModelSpec without loading it.
"""
