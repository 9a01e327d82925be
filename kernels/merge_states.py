"""Merges two partial attentions of the same queries over disjoint sets of keys, exactly.

N rows, M query heads per group, D head_dim.
"""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl

from .dispatch import Backend, check_floats, check_shape, dispatch


def merge_states_ref(
    out_a_NMD: torch.Tensor,
    lse2_a_NM: torch.Tensor,
    out_b_NMD: torch.Tensor,
    lse2_b_NM: torch.Tensor,
    out_NMD: torch.Tensor,
    lse2_NM: torch.Tensor,
) -> None:
    """The formula of `merge_states`."""
    largest_NM = torch.maximum(lse2_a_NM, lse2_b_NM)
    base_NM = largest_NM.masked_fill(largest_NM == -math.inf, 0.0)
    weight_a_NM = torch.exp2(lse2_a_NM - base_NM)
    weight_b_NM = torch.exp2(lse2_b_NM - base_NM)
    total_NM = weight_a_NM + weight_b_NM
    # an empty part may hold anything, NaN included, and must not reach the result
    part_a_NMD = torch.where(weight_a_NM[..., None] > 0, out_a_NMD.float() * weight_a_NM[..., None], 0.0)
    part_b_NMD = torch.where(weight_b_NM[..., None] > 0, out_b_NMD.float() * weight_b_NM[..., None], 0.0)
    divisor_NM = total_NM.masked_fill(total_NM == 0, 1.0)
    out_NMD.copy_((part_a_NMD + part_b_NMD) / divisor_NM[..., None])
    lse2_NM.copy_(base_NM + torch.log2(total_NM))


def merge_states(
    out_a_NMD: torch.Tensor,
    lse2_a_NM: torch.Tensor,
    out_b_NMD: torch.Tensor,
    lse2_b_NM: torch.Tensor,
    out_NMD: torch.Tensor,
    lse2_NM: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> None:
    """out = (2^lse2_a out_a + 2^lse2_b out_b) / (2^lse2_a + 2^lse2_b), lse2 = log2(2^lse2_a + 2^lse2_b), in place.

    out_*: [N, M, D], one float dtype, contiguous. lse2_*: float32 [N, M], contiguous; -inf means an empty part, whose
    values are ignored and whose partner is returned unchanged. out_NMD, lse2_NM may be one of the inputs.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    check_floats(out_a_NMD=out_a_NMD, out_b_NMD=out_b_NMD, out_NMD=out_NMD)
    check_floats(lse2_a_NM=lse2_a_NM, lse2_b_NM=lse2_b_NM, lse2_NM=lse2_NM)
    for name, tensor in (("out_b_NMD", out_b_NMD), ("out_NMD", out_NMD)):
        check_shape(name, tensor, *out_a_NMD.shape)
    for name, tensor in (("lse2_a_NM", lse2_a_NM), ("lse2_b_NM", lse2_b_NM), ("lse2_NM", lse2_NM)):
        check_shape(name, tensor, *out_a_NMD.shape[:2])
    if lse2_a_NM.dtype != torch.float32:
        raise ValueError(f"lse2_a_NM has dtype {lse2_a_NM.dtype}; it must be float32")
    arguments = (out_a_NMD, lse2_a_NM, out_b_NMD, lse2_b_NM, out_NMD, lse2_NM)
    if not all(tensor.is_contiguous() for tensor in arguments):
        raise ValueError("merge_states takes contiguous tensors only; call .contiguous() first")
    dispatch("merge_states", backend, out_a_NMD.device, merge_states_ref, _launch, arguments)


@triton.jit(do_not_specialize=["num_rows"])
@no_type_check
def _merge_states_kernel(
    out_a_pointer,
    lse2_a_pointer,
    out_b_pointer,
    lse2_b_pointer,
    out_pointer,
    lse2_pointer,
    num_rows,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < num_rows)[:, None] & (d < D)
    lse2_a = tl.load(lse2_a_pointer + row, mask=row < num_rows, other=0.0)
    lse2_b = tl.load(lse2_b_pointer + row, mask=row < num_rows, other=0.0)
    largest = tl.maximum(lse2_a, lse2_b)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight_a = tl.exp2(lse2_a - base)
    weight_b = tl.exp2(lse2_b - base)
    total = weight_a + weight_b
    divisor = tl.where(total == 0.0, 1.0, total)
    weight_a = tl.div_rn(weight_a, divisor)  # exactly 1 when the other part is empty
    weight_b = tl.div_rn(weight_b, divisor)
    # masking by the weight, too, keeps what lies in an empty part (NaN, perhaps) out of the result
    out_a = tl.load(out_a_pointer + row[:, None] * D + d, mask=inside & (weight_a > 0)[:, None], other=0.0)
    out_b = tl.load(out_b_pointer + row[:, None] * D + d, mask=inside & (weight_b > 0)[:, None], other=0.0)
    merged = out_a.to(tl.float32) * weight_a[:, None] + out_b.to(tl.float32) * weight_b[:, None]
    tl.store(out_pointer + row[:, None] * D + d, merged.to(out_pointer.dtype.element_ty), mask=inside)
    tl.store(lse2_pointer + row, base + tl.log2(total), mask=row < num_rows)


def _launch(
    out_a_NMD: torch.Tensor,
    lse2_a_NM: torch.Tensor,
    out_b_NMD: torch.Tensor,
    lse2_b_NM: torch.Tensor,
    out_NMD: torch.Tensor,
    lse2_NM: torch.Tensor,
) -> None:
    num_rows, head_dim = lse2_NM.numel(), out_NMD.shape[2]
    if num_rows == 0:
        return
    _merge_states_kernel[(triton.cdiv(num_rows, 8),)](
        out_a_NMD,
        lse2_a_NM,
        out_b_NMD,
        lse2_b_NM,
        out_NMD,
        lse2_NM,
        num_rows,
        D=head_dim,
        BLOCK_N=8,
        BLOCK_D=triton.next_power_of_2(head_dim),
        enable_fp_fusion=True,
    )
