"""Decode attention over paged lanes: U independent problems of M queries against one lane's cached tokens.

A long lane is cut into pieces with a softmax each, which are merged exactly: with lse2 = log2 of a piece's sum of
weights, out = sum of 2^lse2 out over the pieces / sum of 2^lse2.

U lanes to attend over, N (token, head group) entries of q and out, M query heads per group, D head_dim, P pages, S
tokens per page, B lanes of the page table, W pages of a lane.
"""

import math
from collections.abc import Mapping
from functools import cache, partial
from typing import no_type_check

import torch
import triton
import triton.language as tl

from .attention import accumulate, attention_ref, lane_tokens
from .dispatch import Backend, check_floats, check_indices, check_shape, select

# A lane of up to MIN_SPLIT tokens is one piece of work; a longer one is cut into pieces of MIN_SPLIT tokens, or into
# MAX_SPLITS equal ones, whichever is fewer. 32 pieces for each of 8 head groups keep 256 programs busy.
MIN_SPLIT = 256
MAX_SPLITS = 32


def paged_decode_ref(
    q_NMD: torch.Tensor,
    pool_2PSD: torch.Tensor,
    page_table_BW: torch.Tensor,
    lane_U: torch.Tensor,
    qkv_U: torch.Tensor,
    length_U: torch.Tensor,
    scale: float,
    window: int,
    out_NMD: torch.Tensor,
) -> None:
    """The formula of `paged_decode`, one lane after the other."""
    _check(q_NMD, pool_2PSD, page_table_BW, lane_U, qkv_U, length_U, window, out_NMD)
    for lane, qkv, length in zip(lane_U.tolist(), qkv_U.tolist(), length_U.tolist(), strict=True):
        first = max(0, length - window) if window else 0
        k, v = lane_tokens(pool_2PSD, page_table_BW[lane], first, length)
        out_NMD[qkv] = attention_ref(q_NMD[qkv], k, v, scale).to(out_NMD.dtype)


def paged_decode(
    q_NMD: torch.Tensor,
    pool_2PSD: torch.Tensor,
    page_table_BW: torch.Tensor,
    lane_U: torch.Tensor,
    qkv_U: torch.Tensor,
    length_U: torch.Tensor,
    scale: float,
    window: int,
    out_NMD: torch.Tensor,
    *,
    max_length: int | None = None,
    scratch: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """out[qkv_U[u]] = softmax(scale q k) v over the cached tokens of lane lane_U[u], for every u, in place.

    q_NMD, out_NMD: [N, M, D], last dimension contiguous (views into fused QKV are fine), of one float dtype.
    pool_2PSD: [2, P, S, D], one layer of the pool, same dtype. page_table_BW: int32 page ids; token i of a lane lies in
    page table[lane, i // S] at offset i % S. lane_U, qkv_U, length_U: int32, on the same device. Entries of out that
    qkv_U does not name stay untouched; length 0 gives 0.
    window: queries see the last `window` tokens of the lane; 0 means all of them.
    max_length: a bound of length_U known on the host; on CUDA it saves empty programs and scratch memory (without it,
    the width of the page table is the bound) and it never changes a result.
    scratch: float32, for the pieces of long lanes; only the Triton kernel uses it. One stream (or thread) at a time may
    use it. `decode_scratch_numel` says how much a call needs; less is refused with ValueError. None: allocated here.

    What is computed for a lane depends on its length and the window alone, not on the other lanes of the call.
    Bytes read: 2 * min(length, window) * D values per lane. Raises ValueError for wrong shapes, dtypes or devices.
    """
    launch = partial(_launch, max_length=max_length, scratch=scratch)
    run = select("paged_decode", backend, q_NMD.device, paged_decode_ref, launch)
    run(q_NMD, pool_2PSD, page_table_BW, lane_U, qkv_U, length_U, scale, window, out_NMD)


def _check(
    q_NMD: torch.Tensor,
    pool_2PSD: torch.Tensor,
    page_table_BW: torch.Tensor,
    lane_U: torch.Tensor,
    qkv_U: torch.Tensor,
    length_U: torch.Tensor,
    window: int,
    out_NMD: torch.Tensor,
) -> None:
    num_lanes = lane_U.shape[0]
    check_floats(q_NMD=q_NMD, pool_2PSD=pool_2PSD, out_NMD=out_NMD)
    check_indices(torch.int32, q_NMD.device, page_table_BW=page_table_BW, lane_U=lane_U, qkv_U=qkv_U, length_U=length_U)
    check_shape("qkv_U", qkv_U, num_lanes)
    check_shape("length_U", length_U, num_lanes)
    check_shape("out_NMD", out_NMD, *q_NMD.shape)
    check_shape("pool_2PSD", pool_2PSD, 2, *pool_2PSD.shape[1:3], q_NMD.shape[2])
    if window < 0:
        raise ValueError(f"window is {window}; use 0 for no window or a positive number of tokens")


@triton.jit
@no_type_check
def _split_tokens(span, BLOCK_K: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Tokens per split: a function of the number of attended tokens alone, as the placement law asks."""
    even_share = tl.cdiv(tl.cdiv(span, MAX_SPLITS), BLOCK_K) * BLOCK_K
    return tl.maximum(even_share, MIN_SPLIT)


@triton.jit(do_not_specialize=["window", "page_table_stride"])
@no_type_check
def _paged_decode_kernel(
    q_pointer,
    pool_pointer,
    page_table_pointer,
    lane_pointer,
    qkv_pointer,
    length_pointer,
    out_pointer,
    partial_out_pointer,
    partial_lse2_pointer,
    scale_log2,
    window,
    half_stride,
    page_table_stride,
    q_stride_n,
    q_stride_m,
    out_stride_n,
    out_stride_m,
    M: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """One split of one lane: straight to `out` when the lane has no other split, to the scratch memory otherwise."""
    u = tl.program_id(0)
    split = tl.program_id(1)
    length = tl.load(length_pointer + u)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    split_tokens = _split_tokens(length - first, BLOCK_K, MIN_SPLIT, MAX_SPLITS)
    start = first + split * split_tokens
    # a lane without tokens still has its first split, which writes 0 and -inf
    if (start >= length) & (split > 0):
        return
    end = tl.minimum(start + split_tokens, length)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside_MD = (m < M)[:, None] & (d < D)[None, :]
    qkv = tl.load(qkv_pointer + u).to(tl.int64)
    page_table_pointer += tl.load(lane_pointer + u).to(tl.int64) * page_table_stride
    q_MD = tl.load(q_pointer + qkv * q_stride_n + m[:, None] * q_stride_m + d[None, :], mask=inside_MD, other=0.0)

    largest_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.full([BLOCK_M], 0.0, tl.float32)
    sum_MD = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    token_K = start + tl.arange(0, BLOCK_K)
    page_K = tl.load(page_table_pointer + token_K // S, mask=token_K < end, other=0)
    for block_start in range(start, end, BLOCK_K):
        token_K = block_start + tl.arange(0, BLOCK_K)
        offset_K = (page_K.to(tl.int64) * S + token_K % S) * D
        inside_KD = (token_K < end)[:, None] & (d < D)[None, :]
        kv_pointer = pool_pointer + offset_K[:, None] + d[None, :]
        k_KD = tl.load(kv_pointer, mask=inside_KD, other=0.0)
        v_KD = tl.load(kv_pointer + half_stride, mask=inside_KD, other=0.0)
        next_K = token_K + BLOCK_K
        page_K = tl.load(page_table_pointer + next_K // S, mask=next_K < end, other=0)
        score_MK = tl.dot(q_MD, tl.trans(k_KD), input_precision="ieee") * scale_log2
        score_MK = tl.where((token_K < end)[None, :], score_MK, float("-inf"))
        largest_M, total_M, sum_MD = accumulate(score_MK, v_KD, largest_M, total_M, sum_MD)
    out_MD = sum_MD / tl.where(total_M == 0.0, 1.0, total_M)[:, None]

    if length - first <= split_tokens:
        out_offset_MD = qkv * out_stride_n + m[:, None] * out_stride_m + d[None, :]
        tl.store(out_pointer + out_offset_MD, out_MD.to(out_pointer.dtype.element_ty), mask=inside_MD)
    else:
        part = (u.to(tl.int64) * tl.num_programs(1) + split) * M + m
        tl.store(partial_out_pointer + part[:, None] * D + d[None, :], out_MD, mask=inside_MD)
        tl.store(partial_lse2_pointer + part, largest_M + tl.log2(total_M), mask=m < M)


@triton.jit(do_not_specialize=["window", "num_splits"])
@no_type_check
def _merge_splits_kernel(
    partial_out_pointer,
    partial_lse2_pointer,
    qkv_pointer,
    length_pointer,
    out_pointer,
    window,
    num_splits,
    out_stride_n,
    out_stride_m,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Merges the splits of one lane's query head; `num_splits` is only the spacing of lanes in the scratch memory."""
    u = tl.program_id(0)
    m = tl.program_id(1)
    length = tl.load(length_pointer + u)
    span = tl.where(window > 0, tl.minimum(length, window), length)
    split_tokens = _split_tokens(span, BLOCK_K, MIN_SPLIT, MAX_SPLITS)
    if span <= split_tokens:
        return
    split = tl.arange(0, MAX_SPLITS)
    d = tl.arange(0, BLOCK_D)
    used = split * split_tokens < span
    part = (u.to(tl.int64) * num_splits + split) * M + m
    lse2 = tl.load(partial_lse2_pointer + part, mask=used, other=float("-inf"))
    inside = used[:, None] & (d < D)[None, :]
    partial_out = tl.load(partial_out_pointer + part[:, None] * D + d[None, :], mask=inside, other=0.0)
    weight = tl.exp2(lse2 - tl.max(lse2, axis=0))
    out = tl.sum(partial_out * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    qkv = tl.load(qkv_pointer + u).to(tl.int64)
    tl.store(out_pointer + qkv * out_stride_n + m * out_stride_m + d, out.to(out_pointer.dtype.element_ty), mask=d < D)


def _num_splits(longest: int) -> int:
    """The most pieces that a lane of up to `longest` attended tokens is cut into."""
    return min(MAX_SPLITS, max(1, -(-longest // MIN_SPLIT)))


def decode_scratch_numel(num_lanes: int, num_queries: int, head_dim: int, longest: int) -> int:
    """float32 values for the results of all pieces: out and lse2 of `num_lanes` lanes of up to `longest` tokens."""
    return num_lanes * _num_splits(longest) * num_queries * (head_dim + 1)


@cache
def decode_tile(num_queries: int, head_dim: int, dtype: torch.dtype) -> Mapping[str, int]:
    """Constants of one program, the same on every card: they are part of what a lane's result depends on.

    8 KB of keys and 8 KB of values are on their way while the 16 KB before them are used (num_stages 3: page ids are
    fetched yet one block earlier). So two programs fit the shared memory of the smallest cards (compute capability 8.6)
    and five that of the largest, and either has more bytes in flight than its memory's latency asks for.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    return {
        # tensor cores work on 16 rows at least; the bandwidth-bound loop has time for the empty ones
        "BLOCK_M": max(16, triton.next_power_of_2(num_queries)),
        "BLOCK_D": block_d,
        "BLOCK_K": max(16, 8192 // (block_d * dtype.itemsize)),
        "num_warps": 4,
        "num_stages": 3,
    }


def _launch(
    q_NMD: torch.Tensor,
    pool_2PSD: torch.Tensor,
    page_table_BW: torch.Tensor,
    lane_U: torch.Tensor,
    qkv_U: torch.Tensor,
    length_U: torch.Tensor,
    scale: float,
    window: int,
    out_NMD: torch.Tensor,
    max_length: int | None = None,
    scratch: torch.Tensor | None = None,
) -> None:
    _check(q_NMD, pool_2PSD, page_table_BW, lane_U, qkv_U, length_U, window, out_NMD)
    num_lanes, num_queries, head_dim = lane_U.shape[0], q_NMD.shape[1], q_NMD.shape[2]
    if num_lanes == 0:
        return
    page_size = pool_2PSD.shape[2]
    longest = page_table_BW.shape[1] * page_size if max_length is None else max_length
    longest = min(longest, window) if window else longest
    num_splits = _num_splits(longest)
    scratch = _checked_scratch(scratch, num_lanes, num_queries, head_dim, longest, q_NMD.device)
    partial_out, partial_lse2 = scratch, scratch[num_lanes * num_splits * num_queries * head_dim :]
    shape = {"M": num_queries, "D": head_dim, "MIN_SPLIT": MIN_SPLIT, "MAX_SPLITS": MAX_SPLITS}
    tile = decode_tile(num_queries, head_dim, q_NMD.dtype)
    out_strides = out_NMD.stride()[:2]
    _paged_decode_kernel[(num_lanes, num_splits)](
        q_NMD, pool_2PSD, page_table_BW, lane_U, qkv_U, length_U, out_NMD, partial_out, partial_lse2,
        scale * math.log2(math.e), window, pool_2PSD.stride(0), page_table_BW.stride(0), *q_NMD.stride()[:2],
        *out_strides, S=page_size, enable_fp_fusion=True, **shape, **tile,
    )  # fmt: skip
    if num_splits > 1:
        _merge_splits_kernel[(num_lanes, num_queries)](
            partial_out, partial_lse2, qkv_U, length_U, out_NMD, window, num_splits, *out_strides,
            BLOCK_D=tile["BLOCK_D"], BLOCK_K=tile["BLOCK_K"], enable_fp_fusion=True, **shape,
        )  # fmt: skip


def _checked_scratch(
    scratch: torch.Tensor | None, num_lanes: int, num_queries: int, head_dim: int, longest: int, device: torch.device
) -> torch.Tensor:
    """The caller's scratch memory, or new memory. Raises ValueError for less than the call needs."""
    needed = decode_scratch_numel(num_lanes, num_queries, head_dim, longest)
    if scratch is None:
        return torch.empty(needed, dtype=torch.float32, device=device)
    if scratch.numel() < needed:
        raise ValueError(f"scratch has {scratch.numel()} values; {num_lanes} lanes of {longest} tokens need {needed}")
    return scratch
