"""Paged prefill attention: the reference against torch's own attention, the kernel against the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from hetis_kernels.paged_decode import paged_decode
from hetis_kernels.varlen_prefill import paged_prefill
from tests.kernels.against_reference import check

# (new tokens, context) of each chunk: one token, a whole prompt, a page edge, a late chunk, many tiles
CHUNKS = [(1, 1), (5, 5), (16, 32), (3, 70), (70, 160)]
WINDOWS = [0, 1, 20, 100]


class Problem:
    """Prefill arguments for packed chunks; every chunk has a lane in the pool for each head group, shuffled."""

    def __init__(
        self,
        make_lanes: Callable[..., Any],
        chunks: list[tuple[int, int]],
        num_groups: int,
        num_queries: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.chunks = chunks
        contexts = [context for _, context in chunks]
        self.lanes = make_lanes([context for context in contexts for _ in range(num_groups)], head_dim, dtype)
        self.scale = head_dim**-0.5
        shuffle = torch.randperm(len(chunks) * num_groups)
        self.lane_CG = torch.empty_like(shuffle)
        self.lane_CG[shuffle] = torch.arange(shuffle.numel())
        self.table_BW = self.lanes.page_table_BW[shuffle]
        self.lane_CG = self.lane_CG.view(len(chunks), num_groups).int()
        starts = [0]
        for num_tokens, _ in chunks:
            starts.append(starts[-1] + num_tokens)
        self.query_start_C1 = torch.tensor(starts).int()
        self.context_C = torch.tensor(contexts).int()
        self.qkv_TGHD = torch.randn(starts[-1], num_groups, num_queries + 2, head_dim).to(dtype)

    def run(
        self, device: torch.device, window: int, first: int = 0, last: int | None = None, **options: Any
    ) -> torch.Tensor:
        """out of the chunks [first, last) on the CPU."""
        last = len(self.chunks) if last is None else last
        starts = self.query_start_C1[first : last + 1]
        q_TGMD = self.qkv_TGHD[starts[0] : starts[-1]].to(device)[:, :, :-2]
        out = torch.full(q_TGMD.shape, 7.0, dtype=q_TGMD.dtype, device=device)
        indices = (starts - starts[0], self.lane_CG[first:last], self.context_C[first:last])
        pool, table = self.lanes.pool_2PSD.to(device), self.table_BW.to(device)
        paged_prefill(q_TGMD, pool, table, *(index.to(device) for index in indices), self.scale, window, out, **options)
        return out.cpu()


@pytest.mark.parametrize("window", WINDOWS)
def test_reference_is_torch_attention(make_lanes: Callable[..., Any], window: int) -> None:
    problem = Problem(make_lanes, CHUNKS, 2, 3, 64, torch.float32)
    out = problem.run(torch.device("cpu"), window, backend="reference")
    for chunk, (num_tokens, context) in enumerate(CHUNKS):
        tokens = slice(int(problem.query_start_C1[chunk]), int(problem.query_start_C1[chunk + 1]))
        position = torch.arange(context - num_tokens, context)[:, None]
        key = torch.arange(context)
        visible = (key <= position) & ((key > position - window) if window else True)
        for group in range(2):
            q = problem.qkv_TGHD[tokens, group, :-2].double().transpose(0, 1)
            k, v = (x[chunk * 2 + group].double() for x in (problem.lanes.k, problem.lanes.v))
            expected = functional.scaled_dot_product_attention(q, k[None], v[None], attn_mask=visible)
            torch.testing.assert_close(out[tokens, group].transpose(0, 1).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_queries", range(1, 9))
def test_kernel_is_reference_for_every_group_size(
    make_lanes: Callable[..., Any], device: torch.device, num_queries: int
) -> None:
    head_dim, dtype = (64, 80, 128)[num_queries % 3], torch.float32 if num_queries <= 3 else torch.bfloat16
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    problem = Problem(make_lanes, CHUNKS, 1, num_queries, head_dim, dtype)
    check(problem, device, 0, {"rtol": tolerance, "atol": tolerance})


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("window", WINDOWS[1:])
def test_kernel_is_reference_for_every_head_dim_and_window(
    make_lanes: Callable[..., Any], device: torch.device, head_dim: int, window: int
) -> None:
    problem = Problem(make_lanes, CHUNKS, 2, 2, head_dim, torch.float16)
    check(problem, device, window, {"rtol": 4e-3, "atol": 4e-3})


def test_many_queries_per_group(make_lanes: Callable[..., Any], device: torch.device) -> None:
    problem = Problem(make_lanes, CHUNKS[:3], 1, 20, 64, torch.float32)
    check(problem, device, 0, {"rtol": 1e-4, "atol": 2e-5})


def test_keys_behind_the_window_may_be_gone(make_lanes: Callable[..., Any], device: torch.device) -> None:
    """Their pages may be reused: the table names a poisoned page for them, and no result changes."""
    problem = Problem(make_lanes, [(3, 70), (1, 40)], 1, 2, 64, torch.float32)
    whole = problem.run(device, 20, backend="triton")
    for chunk, (num_tokens, context) in enumerate(problem.chunks):
        gone_pages = (context - num_tokens - 20 + 1) // 16
        problem.table_BW[problem.lane_CG[chunk, 0], :gone_pages] = problem.table_BW[0, -1]
    for backend in ("triton", "reference"):
        torch.testing.assert_close(problem.run(device, 20, backend=backend), whole, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("window", [0, 20])
def test_a_chunk_alone_is_the_chunk_in_a_batch(
    make_lanes: Callable[..., Any], device: torch.device, window: int
) -> None:
    """Bit for bit."""
    problem = Problem(make_lanes, CHUNKS, 2, 3, 64, torch.bfloat16)
    out = problem.run(device, window, backend="triton")
    for chunk in range(len(CHUNKS)):
        tokens = slice(int(problem.query_start_C1[chunk]), int(problem.query_start_C1[chunk + 1]))
        assert torch.equal(problem.run(device, window, chunk, chunk + 1, backend="triton"), out[tokens])


@pytest.mark.parametrize("window", [0, 20])
def test_a_chunk_of_one_token_is_a_decode(make_lanes: Callable[..., Any], window: int) -> None:
    problem = Problem(make_lanes, [(1, 33), (1, 1), (1, 70)], 1, 4, 64, torch.float32)
    out = problem.run(torch.device("cpu"), window, backend="reference")
    q_NMD, decoded = problem.qkv_TGHD[:, 0, :-2], torch.empty_like(out[:, 0])
    indices = (problem.lane_CG[:, 0].contiguous(), torch.arange(3).int(), problem.context_C)
    paged_decode(
        q_NMD,
        problem.lanes.pool_2PSD,
        problem.table_BW,
        *indices,
        problem.scale,
        window,
        decoded,
        backend="reference",
    )
    torch.testing.assert_close(decoded, out[:, 0])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_arguments_are_checked(make_lanes: Callable[..., Any], device: torch.device, backend: str) -> None:
    problem = Problem(make_lanes, CHUNKS[:2], 1, 2, 64, torch.float32)
    with pytest.raises(ValueError, match="window is -1"):
        problem.run(device, -1, backend=backend)
    problem.lane_CG = problem.lane_CG.repeat(1, 2)
    with pytest.raises(ValueError, match="lane_CG has shape"):
        problem.run(device, 0, backend=backend)
