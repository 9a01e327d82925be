"""Attention of prompts without cached context by the package flash-attn, where it is installed and works.

FlashAttention-2 (Dao 2023) reads K and V from the output of the QKV projection instead of from pages. It is a second
implementation of what `paged_prefill` computes for chunks whose first token is the first of their sequence. It adds in
another order, so the two agree to rounding, and a process uses one of them for all such chunks.

T tokens of all prompts, C prompts, G head groups, M query heads per group, H = M + 2 heads of a group, D head_dim.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch

MAX_HEAD_DIM = 256  # of FlashAttention-2

_log = logging.getLogger(__name__)

Attend = Callable[..., torch.Tensor]


@cache
def load_flash() -> tuple[Attend, str] | None:
    """(flash_attn_varlen_func, version of the package), or None where it cannot be imported.

    A package that is installed but fails to import (mostly one built for another torch) is not used, which is logged.
    """
    try:
        import flash_attn
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        _log.warning(
            "flash-attn is installed and cannot be used (%s); build it for this torch or uninstall it.", reason
        )
        return None
    return flash_attn.flash_attn_varlen_func, str(flash_attn.__version__)


def flash_serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `flash_prefill` can be used for this model on this device."""
    is_possible = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_dim <= MAX_HEAD_DIM
    return is_possible and load_flash() is not None


def prompt_attention(uses_flash: bool) -> str:
    """Description of what computes the attention of prompts, for the user."""
    found = load_flash() if uses_flash else None
    own = "kernels of hetis"
    return own if found is None else f"flash-attn {found[1]}; where a part is cached, {own}"


def flash_prefill(
    qkv_TGHD: torch.Tensor,
    query_start_C1: torch.Tensor,
    max_tokens: int,
    scale: float,
    window: int,
    out_TGMD: torch.Tensor,
) -> None:
    """out = softmax(scale q k, causal) v for C whole prompts packed along T, in place.

    Prompt c is the tokens query_start_C1[c]:query_start_C1[c + 1], at most `max_tokens` of them; a token at position p
    sees the keys at (p - window, p], at [0, p] for window 0.

    qkv_TGHD: [T, G, M + 2, D], float16 or bfloat16, last dimension contiguous. query_start_C1: int32. out_TGMD: [T, G,
    M, D], same dtype, contiguous. flash-attn requires one stride between all query heads of a token, which qkv lacks: q
    is copied into `out_TGMD` first, and then overwritten by the result, which the package allocates.
    """
    found = load_flash()
    assert found is not None, "flash_prefill is called where flash-attn cannot be imported"
    assert out_TGMD.is_contiguous(), "the queries are passed to flash-attn in out_TGMD, which must be contiguous"
    num_queries = out_TGMD.shape[2]
    out_TGMD.copy_(qkv_TGHD[:, :, :num_queries])
    heads_TND = out_TGMD.flatten(1, 2)
    attended_TND = found[0](
        heads_TND,
        qkv_TGHD[:, :, num_queries],
        qkv_TGHD[:, :, num_queries + 1],
        query_start_C1,
        query_start_C1,
        max_tokens,
        max_tokens,
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
    )
    heads_TND.copy_(attended_TND)
