"""A stand-in for the package flash-attn on CPUs: checks its documented contract and computes with torch's attention.

Accepts the arguments of FlashAttention-2's `flash_attn_varlen_func`: packed [tokens, heads, head_dim] with contiguous
last dimensions, int32 offsets that begin at 0 and end at the number of tokens, query heads a multiple of the key heads.
"""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch.nn import functional


class FlashAttention:
    """The module's function; records the number of prompts of each call."""

    def __init__(self) -> None:
        self.prompts_of_calls: list[int] = []

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        assert isinstance(max_seqlen_q, int)
        assert isinstance(max_seqlen_k, int)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        starts = cu_seqlens_q.tolist()
        lengths = [stop - start for start, stop in pairwise(starts)]
        assert starts[0] == 0
        assert starts[-1] == len(q) == len(k) == len(v)
        assert min(lengths) > 0
        assert max(lengths) == max_seqlen_q == max_seqlen_k
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert q.shape[1] % k.shape[1] == 0
        assert q.shape[2] <= 256
        assert dropout_p == 0.0
        assert causal
        self.prompts_of_calls.append(len(lengths))
        out = torch.empty_like(q)
        for start, length in zip(starts, lengths, strict=False):
            tokens, position = slice(start, start + length), torch.arange(length)
            visible = position[None, :] <= position[:, None]
            if window_size != (-1, -1):
                left, right = window_size
                assert right == 0
                visible &= position[None, :] >= position[:, None] - left
            q_NTD, k_NTD, v_NTD = (x[tokens].transpose(0, 1)[None] for x in (q, k, v))
            attended = functional.scaled_dot_product_attention(
                q_NTD, k_NTD, v_NTD, attn_mask=visible, scale=softmax_scale, enable_gqa=True
            )
            out[tokens] = attended[0].transpose(0, 1)
        return out


def install(monkeypatch: pytest.MonkeyPatch) -> FlashAttention:
    """Makes `import flash_attn` import the stand-in. The caller clears the cache of `load_flash` before and after."""
    module, function = ModuleType("flash_attn"), FlashAttention()
    module.flash_attn_varlen_func = function  # type: ignore[attr-defined]
    module.__version__ = "2.8.3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return function
