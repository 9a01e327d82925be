"""Writes new keys and values into their cells of the pool.

A appended (token, head group) pairs, N pairs in k and v, D head_dim, P pages, S tokens per page. A cell is the place of
one token in a page: cell = page * S + offset.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .dispatch import Backend, check_floats, check_indices, check_shape, select


def kv_append_ref(
    k_ND: torch.Tensor, v_ND: torch.Tensor, pool_2PSD: torch.Tensor, qkv_A: torch.Tensor, cell_A: torch.Tensor
) -> None:
    """The formula of `kv_append` as two indexed assignments."""
    _check(k_ND, v_ND, pool_2PSD, qkv_A, cell_A)
    pool_2CD = pool_2PSD.flatten(1, 2)
    pool_2CD[0][cell_A] = k_ND[qkv_A.long()]
    pool_2CD[1][cell_A] = v_ND[qkv_A.long()]


def kv_append(
    k_ND: torch.Tensor,
    v_ND: torch.Tensor,
    pool_2PSD: torch.Tensor,
    qkv_A: torch.Tensor,
    cell_A: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> None:
    """pool[0][cell_A[a]] = k_ND[qkv_A[a]] and pool[1][cell_A[a]] = v_ND[qkv_A[a]], in place.

    k_ND, v_ND: [N, D], any stride of N (views into fused qkv). pool_2PSD: [2, P, S, D], each half contiguous, same
    dtype. qkv_A: int32. cell_A: int64, no cell twice. Raises ValueError for wrong shapes, dtypes or devices.
    """
    select("kv_append", backend, k_ND.device, kv_append_ref, _launch)(k_ND, v_ND, pool_2PSD, qkv_A, cell_A)


def _check(
    k_ND: torch.Tensor, v_ND: torch.Tensor, pool_2PSD: torch.Tensor, qkv_A: torch.Tensor, cell_A: torch.Tensor
) -> None:
    check_floats(k_ND=k_ND, v_ND=v_ND, pool_2PSD=pool_2PSD)
    check_indices(torch.int32, k_ND.device, qkv_A=qkv_A)
    check_indices(torch.int64, k_ND.device, cell_A=cell_A)
    check_shape("v_ND", v_ND, *k_ND.shape)
    check_shape("cell_A", cell_A, *qkv_A.shape)
    check_shape("pool_2PSD", pool_2PSD, 2, *pool_2PSD.shape[1:3], k_ND.shape[1])
    if not pool_2PSD[0].is_contiguous():
        raise ValueError("pool_2PSD is not contiguous over pages; pass one layer of a contiguous pool")


@triton.jit(do_not_specialize=["num_pairs"])
@no_type_check
def _kv_append_kernel(
    k_pointer,
    v_pointer,
    pool_pointer,
    qkv_pointer,
    cell_pointer,
    num_pairs,
    k_stride,
    v_stride,
    half_stride,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    d = tl.arange(0, BLOCK_D)[None, :]
    qkv = tl.load(qkv_pointer + a, mask=a < num_pairs, other=0).to(tl.int64)[:, None]
    cell = tl.load(cell_pointer + a, mask=a < num_pairs, other=0)[:, None]
    inside = (a < num_pairs)[:, None] & (d < D)
    k = tl.load(k_pointer + qkv * k_stride + d, mask=inside)
    v = tl.load(v_pointer + qkv * v_stride + d, mask=inside)
    tl.store(pool_pointer + cell * D + d, k, mask=inside)
    tl.store(pool_pointer + half_stride + cell * D + d, v, mask=inside)


def _launch(
    k_ND: torch.Tensor, v_ND: torch.Tensor, pool_2PSD: torch.Tensor, qkv_A: torch.Tensor, cell_A: torch.Tensor
) -> None:
    _check(k_ND, v_ND, pool_2PSD, qkv_A, cell_A)
    num_pairs, head_dim = qkv_A.shape[0], k_ND.shape[1]
    if num_pairs == 0:
        return
    _kv_append_kernel[(triton.cdiv(num_pairs, 8),)](
        k_ND,
        v_ND,
        pool_2PSD,
        qkv_A,
        cell_A,
        num_pairs,
        k_ND.stride(0),
        v_ND.stride(0),
        pool_2PSD.stride(0),
        D=head_dim,
        BLOCK_A=8,
        BLOCK_D=triton.next_power_of_2(head_dim),
        enable_fp_fusion=True,
    )
