"""Prefill attention of packed prompt chunks over paged lanes, causal, with keys and values read from the pool.

T tokens of all chunks, C chunks, G head groups, M query heads per group, D head_dim, P pages, S tokens per page, B
lanes of the page table, W pages of a lane.
"""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl

from .attention import accumulate, attention_ref, lane_tokens
from .dispatch import Backend, check_floats, check_indices, check_shape, select


def paged_prefill_ref(
    q_TGMD: torch.Tensor,
    pool_2PSD: torch.Tensor,
    page_table_BW: torch.Tensor,
    query_start_C1: torch.Tensor,
    lane_CG: torch.Tensor,
    context_C: torch.Tensor,
    scale: float,
    window: int,
    out_TGMD: torch.Tensor,
) -> None:
    """The formula of `paged_prefill`, one head group of one chunk after the other."""
    _check(q_TGMD, pool_2PSD, page_table_BW, query_start_C1, lane_CG, context_C, window, out_TGMD)
    num_queries, head_dim = q_TGMD.shape[2:]
    starts = query_start_C1.tolist()
    for chunk, context in enumerate(context_C.tolist()):
        tokens = slice(starts[chunk], starts[chunk + 1])
        num_tokens = starts[chunk + 1] - starts[chunk]
        key_K = torch.arange(context, device=q_TGMD.device)
        # rows of the score matrix are (token, query head); all heads of a token share its position
        position_Q = torch.arange(context - num_tokens, context, device=q_TGMD.device).repeat_interleave(num_queries)
        visible_QK = key_K <= position_Q[:, None]
        if window:
            visible_QK &= key_K > position_Q[:, None] - window
        for group, lane in enumerate(lane_CG[chunk].tolist()):
            k, v = lane_tokens(pool_2PSD, page_table_BW[lane], 0, context)
            q_QD = q_TGMD[tokens, group].reshape(-1, head_dim)
            # keys behind every window of the chunk may be gone from the cache, their pages reused
            gone = ~visible_QK.any(dim=0)
            k[gone], v[gone] = 0, 0
            out = attention_ref(q_QD, k, v, scale, visible_QK)
            out_TGMD[tokens, group] = out.view(num_tokens, num_queries, head_dim).to(out_TGMD.dtype)


def paged_prefill(
    q_TGMD: torch.Tensor,
    pool_2PSD: torch.Tensor,
    page_table_BW: torch.Tensor,
    query_start_C1: torch.Tensor,
    lane_CG: torch.Tensor,
    context_C: torch.Tensor,
    scale: float,
    window: int,
    out_TGMD: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> None:
    """out = softmax(scale q k, causal) v for C chunks of new tokens packed along T, in place.

    Chunk c holds the tokens query_start_C1[c]:query_start_C1[c + 1], n_c >= 1 of them, at positions
    context_C[c] - n_c ... context_C[c] - 1; K and V of all context_C[c] tokens are already in the pool, head group g of
    chunk c in lane lane_CG[c, g]. A query at position p sees the keys at (p - window, p], at [0, p] for window 0.

    q_TGMD, out_TGMD: [T, G, M, D], last dimension contiguous, one float dtype. pool_2PSD: [2, P, S, D] same dtype.
    page_table_BW, query_start_C1, lane_CG, context_C: int32 on the same device. Raises ValueError for wrong shapes,
    dtypes or devices.
    """
    run = select("paged_prefill", backend, q_TGMD.device, paged_prefill_ref, _launch)
    run(q_TGMD, pool_2PSD, page_table_BW, query_start_C1, lane_CG, context_C, scale, window, out_TGMD)


def _check(
    q_TGMD: torch.Tensor,
    pool_2PSD: torch.Tensor,
    page_table_BW: torch.Tensor,
    query_start_C1: torch.Tensor,
    lane_CG: torch.Tensor,
    context_C: torch.Tensor,
    window: int,
    out_TGMD: torch.Tensor,
) -> None:
    num_chunks = context_C.shape[0]
    check_floats(q_TGMD=q_TGMD, pool_2PSD=pool_2PSD, out_TGMD=out_TGMD)
    check_indices(
        torch.int32,
        q_TGMD.device,
        page_table_BW=page_table_BW,
        query_start_C1=query_start_C1,
        lane_CG=lane_CG,
        context_C=context_C,
    )
    check_shape("query_start_C1", query_start_C1, num_chunks + 1)
    check_shape("lane_CG", lane_CG, num_chunks, q_TGMD.shape[1])
    check_shape("out_TGMD", out_TGMD, *q_TGMD.shape)
    check_shape("pool_2PSD", pool_2PSD, 2, *pool_2PSD.shape[1:3], q_TGMD.shape[3])
    if window < 0:
        raise ValueError(f"window is {window}; use 0 for no window or a positive number of tokens")


@triton.jit
@no_type_check
def _chunk_of_tile(tile, query_start_pointer, num_chunks, BLOCK_T: tl.constexpr):
    """The chunk of that tile; chunk c owns the tiles from query_start[c] // BLOCK_T + c on, enough for its tokens."""
    first, last = 0, num_chunks - 1
    while first < last:
        middle = (first + last + 1) // 2
        begun = tl.load(query_start_pointer + middle) // BLOCK_T + middle <= tile
        first = tl.where(begun, middle, first)
        last = tl.where(begun, last, middle - 1)
    return first


@triton.jit(do_not_specialize=["num_chunks", "window", "page_table_stride"])
@no_type_check
def _paged_prefill_kernel(
    q_pointer,
    pool_pointer,
    page_table_pointer,
    query_start_pointer,
    lane_pointer,
    context_pointer,
    out_pointer,
    num_chunks,
    scale_log2,
    window,
    half_stride,
    page_table_stride,
    q_stride_t,
    q_stride_g,
    q_stride_m,
    out_stride_t,
    out_stride_g,
    out_stride_m,
    M: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_Q // M tokens of one chunk, the M query heads of each packed as rows that share every block of keys."""
    BLOCK_T: tl.constexpr = BLOCK_Q // M
    tile = tl.program_id(0)
    group = tl.program_id(1)
    chunk = _chunk_of_tile(tile, query_start_pointer, num_chunks, BLOCK_T)
    query_start = tl.load(query_start_pointer + chunk)
    num_tokens = tl.load(query_start_pointer + chunk + 1) - query_start
    first_token = (tile - (query_start // BLOCK_T + chunk)) * BLOCK_T
    if first_token >= num_tokens:
        return

    # positions of the tile's tokens, and the keys that at least one of them sees: [first_key, end_key)
    num_cached = tl.load(context_pointer + chunk) - num_tokens
    end_key = num_cached + tl.minimum(first_token + BLOCK_T, num_tokens)
    first_key = tl.where(window > 0, tl.maximum(num_cached + first_token - window + 1, 0), 0)

    row_Q = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    token_Q = first_token + row_Q // M
    position_Q = num_cached + token_Q
    oldest_Q = tl.where(window > 0, position_Q - window + 1, 0)
    inside_Q = (row_Q < BLOCK_T * M) & (token_Q < num_tokens)
    inside_QD = inside_Q[:, None] & (d < D)[None, :]
    token_Q = (query_start + token_Q).to(tl.int64)
    q_offset_Q = token_Q * q_stride_t + group * q_stride_g + (row_Q % M) * q_stride_m
    q_QD = tl.load(q_pointer + q_offset_Q[:, None] + d[None, :], mask=inside_QD, other=0.0)
    lane = tl.load(lane_pointer + chunk * tl.num_programs(1) + group).to(tl.int64)
    page_table_pointer += lane * page_table_stride

    largest_Q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total_Q = tl.full([BLOCK_Q], 0.0, tl.float32)
    sum_QD = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)
    key_K = first_key + tl.arange(0, BLOCK_K)
    page_K = tl.load(page_table_pointer + key_K // S, mask=key_K < end_key, other=0)
    for block_start in range(first_key, end_key, BLOCK_K):
        key_K = block_start + tl.arange(0, BLOCK_K)
        offset_K = (page_K.to(tl.int64) * S + key_K % S) * D
        inside_KD = (key_K < end_key)[:, None] & (d < D)[None, :]
        kv_pointer = pool_pointer + offset_K[:, None] + d[None, :]
        k_KD = tl.load(kv_pointer, mask=inside_KD, other=0.0)
        v_KD = tl.load(kv_pointer + half_stride, mask=inside_KD, other=0.0)
        next_K = key_K + BLOCK_K
        page_K = tl.load(page_table_pointer + next_K // S, mask=next_K < end_key, other=0)
        visible_QK = (key_K[None, :] <= position_Q[:, None]) & (key_K[None, :] >= oldest_Q[:, None])
        score_QK = tl.dot(q_QD, tl.trans(k_KD), input_precision="ieee") * scale_log2
        score_QK = tl.where(visible_QK, score_QK, float("-inf"))
        largest_Q, total_Q, sum_QD = accumulate(score_QK, v_KD, largest_Q, total_Q, sum_QD)
    out_QD = sum_QD / tl.where(total_Q == 0.0, 1.0, total_Q)[:, None]

    out_offset_Q = token_Q * out_stride_t + group * out_stride_g + (row_Q % M) * out_stride_m
    tl.store(out_pointer + out_offset_Q[:, None] + d[None, :], out_QD.to(out_pointer.dtype.element_ty), mask=inside_QD)


def prefill_tile(num_queries: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of one program, the same on every card: the largest that spill no registers at compute capability 8.0
    to 9.0 and fit the shared memory of 8.6. float32 has no tensor cores to feed and far fewer registers to spare."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    half = dtype.itemsize == 2
    return {
        "BLOCK_Q": min(128, 16384 // block_d) if half else max(16, triton.next_power_of_2(num_queries)),
        "BLOCK_D": block_d,
        "BLOCK_K": max(16, 8192 // (block_d * dtype.itemsize)),
        "num_warps": 8 if half else 4,
        "num_stages": 3,
    }


def _launch(
    q_TGMD: torch.Tensor,
    pool_2PSD: torch.Tensor,
    page_table_BW: torch.Tensor,
    query_start_C1: torch.Tensor,
    lane_CG: torch.Tensor,
    context_C: torch.Tensor,
    scale: float,
    window: int,
    out_TGMD: torch.Tensor,
) -> None:
    _check(q_TGMD, pool_2PSD, page_table_BW, query_start_C1, lane_CG, context_C, window, out_TGMD)
    num_tokens, num_groups, num_queries, head_dim = q_TGMD.shape
    num_chunks = context_C.shape[0]
    tile = prefill_tile(num_queries, head_dim, q_TGMD.dtype)
    if num_queries > tile["BLOCK_Q"]:
        raise ValueError(f"{num_queries} query heads per group; the prefill kernel holds at most {tile['BLOCK_Q']}")
    if num_chunks == 0 or num_groups == 0:
        return
    num_tiles = num_tokens // (tile["BLOCK_Q"] // num_queries) + num_chunks
    _paged_prefill_kernel[(num_tiles, num_groups)](
        q_TGMD,
        pool_2PSD,
        page_table_BW,
        query_start_C1,
        lane_CG,
        context_C,
        out_TGMD,
        num_chunks,
        scale * math.log2(math.e),
        window,
        pool_2PSD.stride(0),
        page_table_BW.stride(0),
        *q_TGMD.stride()[:3],
        *out_TGMD.stride()[:3],
        M=num_queries,
        D=head_dim,
        S=pool_2PSD.shape[2],
        enable_fp_fusion=True,
        **tile,
    )
