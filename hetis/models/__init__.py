"""Level 3: the decoder as pure computation; attention and reduction are passed in. Never imports torch.distributed.

`families`, `hub`, `weight_files` and `end_tokens` do not import torch, so that front ends and launchers start faster.
"""
