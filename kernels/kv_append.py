"""Writes new K and V rows into their slots of the pool.

A appended rows, N rows of k and v, D head_dim, P pages, S tokens per page.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .dispatch import Backend, check_floats, check_indices, check_shape, select


def kv_append_ref(
    k_ND: torch.Tensor, v_ND: torch.Tensor, pool_2PSD: torch.Tensor, row_A: torch.Tensor, slot_A: torch.Tensor
) -> None:
    """The formula of `kv_append` as two indexed assignments."""
    _check(k_ND, v_ND, pool_2PSD, row_A, slot_A)
    pool_2XD = pool_2PSD.flatten(1, 2)
    pool_2XD[0][slot_A] = k_ND[row_A.long()]
    pool_2XD[1][slot_A] = v_ND[row_A.long()]


def kv_append(
    k_ND: torch.Tensor,
    v_ND: torch.Tensor,
    pool_2PSD: torch.Tensor,
    row_A: torch.Tensor,
    slot_A: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> None:
    """pool[0][slot_A[a]] = k_ND[row_A[a]] and pool[1][slot_A[a]] = v_ND[row_A[a]], in place.

    k_ND, v_ND: [N, D], rows may be strided (views into fused QKV rows). pool_2PSD: [2, P, S, D], each half contiguous,
    same dtype; slot = page * S + offset. row_A: int32. slot_A: int64, no slot twice. Raises ValueError for wrong
    shapes, dtypes or devices.
    """
    select("kv_append", backend, k_ND.device, kv_append_ref, _launch)(k_ND, v_ND, pool_2PSD, row_A, slot_A)


def _check(
    k_ND: torch.Tensor, v_ND: torch.Tensor, pool_2PSD: torch.Tensor, row_A: torch.Tensor, slot_A: torch.Tensor
) -> None:
    check_floats(k_ND=k_ND, v_ND=v_ND, pool_2PSD=pool_2PSD)
    check_indices(torch.int32, k_ND.device, row_A=row_A)
    check_indices(torch.int64, k_ND.device, slot_A=slot_A)
    check_shape("v_ND", v_ND, *k_ND.shape)
    check_shape("slot_A", slot_A, *row_A.shape)
    check_shape("pool_2PSD", pool_2PSD, 2, *pool_2PSD.shape[1:3], k_ND.shape[1])
    if not pool_2PSD[0].is_contiguous():
        raise ValueError("pool_2PSD is not contiguous over pages; pass one layer of a contiguous pool")


@triton.jit(do_not_specialize=["num_rows"])
@no_type_check
def _kv_append_kernel(
    k_pointer,
    v_pointer,
    pool_pointer,
    row_pointer,
    slot_pointer,
    num_rows,
    k_stride,
    v_stride,
    half_stride,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    d = tl.arange(0, BLOCK_D)[None, :]
    row = tl.load(row_pointer + a, mask=a < num_rows, other=0).to(tl.int64)[:, None]
    slot = tl.load(slot_pointer + a, mask=a < num_rows, other=0)[:, None]
    inside = (a < num_rows)[:, None] & (d < D)
    k = tl.load(k_pointer + row * k_stride + d, mask=inside)
    v = tl.load(v_pointer + row * v_stride + d, mask=inside)
    tl.store(pool_pointer + slot * D + d, k, mask=inside)
    tl.store(pool_pointer + half_stride + slot * D + d, v, mask=inside)


def _launch(
    k_ND: torch.Tensor, v_ND: torch.Tensor, pool_2PSD: torch.Tensor, row_A: torch.Tensor, slot_A: torch.Tensor
) -> None:
    _check(k_ND, v_ND, pool_2PSD, row_A, slot_A)
    num_rows, head_dim = row_A.shape[0], k_ND.shape[1]
    if num_rows == 0:
        return
    _kv_append_kernel[(triton.cdiv(num_rows, 8),)](
        k_ND,
        v_ND,
        pool_2PSD,
        row_A,
        slot_A,
        num_rows,
        k_ND.stride(0),
        v_ND.stride(0),
        pool_2PSD.stride(0),
        D=head_dim,
        BLOCK_A=8,
        BLOCK_D=triton.next_power_of_2(head_dim),
        enable_fp_fusion=True,
    )
