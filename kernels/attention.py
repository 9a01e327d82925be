"""Parts shared by decode and prefill attention: the reference for one lane, and one step of a running softmax.

Q queries, K keys, D head_dim, P pages, S tokens per page, W page-table entries of a lane.
"""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl


def lane_tokens(
    pool_2PSD: torch.Tensor, page_table_W: torch.Tensor, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [last - first, D] in float32 of the tokens [first, last) of a lane."""
    page_size = pool_2PSD.shape[2]
    token = torch.arange(first, last, device=pool_2PSD.device)
    cell = page_table_W[token // page_size].long() * page_size + token % page_size
    k, v = pool_2PSD.flatten(1, 2)[:, cell].float().unbind(0)
    return k, v


def attention_ref(
    q_QD: torch.Tensor, k_KD: torch.Tensor, v_KD: torch.Tensor, scale: float, visible_QK: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale q k) v in float32; no key gives 0."""
    score_QK = scale * (q_QD.float() @ k_KD.T)
    if visible_QK is not None:
        score_QK = score_QK.masked_fill(~visible_QK, -math.inf)
    return torch.softmax(score_QK, dim=1) @ v_KD


@triton.jit
@no_type_check
def accumulate(score_QK, v_KD, largest_Q, total_Q, sum_QD):
    """Adds a block of keys to a running softmax: the largest score, the sum of weights, the weighted sum of values.

    Scores are base-2 logarithms, -inf for keys that a query does not see.
    """
    new_largest_Q = tl.maximum(largest_Q, tl.max(score_QK, axis=1))
    # no key seen so far: -inf - -inf would be NaN
    base_Q = tl.where(new_largest_Q == float("-inf"), 0.0, new_largest_Q)
    weight_QK = tl.exp2(score_QK - base_Q[:, None])
    shrink_Q = tl.exp2(largest_Q - base_Q)
    total_Q = total_Q * shrink_Q + tl.sum(weight_QK, axis=1)
    sum_QD = tl.dot(weight_QK.to(v_KD.dtype), v_KD, sum_QD * shrink_Q[:, None], input_precision="ieee")
    return new_largest_Q, total_Q, sum_QD
