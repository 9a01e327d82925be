"""Paged decode attention: the reference against torch's own attention, the kernel against the reference."""

import importlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn import functional

from hetis_kernels.paged_decode import MAX_SPLITS, MIN_SPLIT, decode_scratch_numel, paged_decode, paged_decode_ref
from tests.kernels.against_reference import check
from tests.processes.look import DEADLINE

LENGTHS = [1, 16, 17, MIN_SPLIT, MIN_SPLIT + 1, 520]
WINDOWS = [0, 1, 33, 300]


class Problem:
    """Decode arguments for lanes in a shuffled order, with entries of q and out that no lane names."""

    def __init__(
        self, make_lanes: Callable[..., Any], lengths: list[int], num_queries: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        num_lanes, num_entries = len(lengths), len(lengths) + 2
        self.lanes = make_lanes(lengths, head_dim, dtype)
        self.scale = head_dim**-0.5
        # queries lie in fused QKV, so the stride of N is not M * D
        self.q_NMD = torch.randn(num_entries, num_queries + 2, head_dim).to(dtype)[:, :num_queries]
        self.lane_U = torch.randperm(num_lanes).int()
        self.qkv_U = torch.randperm(num_entries)[:num_lanes].int()
        self.length_U = torch.tensor(lengths).int()[self.lane_U.long()]

    def run(self, device: torch.device, window: int, chosen: slice = slice(None), **options: Any) -> torch.Tensor:
        """out on the CPU, with 7 in every place that was not written."""
        q_NMD = torch.empty_strided(self.q_NMD.shape, self.q_NMD.stride(), dtype=self.q_NMD.dtype, device=device)
        q_NMD.copy_(self.q_NMD)
        out = torch.full(q_NMD.shape, 7.0, dtype=q_NMD.dtype, device=device)
        lanes = self.lanes.to(device)
        indices = [index[chosen].to(device) for index in (self.lane_U, self.qkv_U, self.length_U)]
        paged_decode(q_NMD, lanes.pool_2PSD, lanes.page_table_BW, *indices, self.scale, window, out, **options)
        return out.cpu()


@pytest.mark.parametrize("window", WINDOWS)
def test_reference_is_torch_attention(make_lanes: Callable[..., Any], window: int) -> None:
    problem = Problem(make_lanes, LENGTHS, 3, 64, torch.float32)
    out = problem.run(torch.device("cpu"), window, backend="reference")
    for lane, qkv, length in zip(*(x.tolist() for x in (problem.lane_U, problem.qkv_U, problem.length_U)), strict=True):
        first = max(0, length - window) if window else 0
        q, k, v = (x.double() for x in (problem.q_NMD[qkv], problem.lanes.k[lane], problem.lanes.v[lane]))
        k, v = k[first:length], v[first:length]
        expected = functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=problem.scale)[0]
        torch.testing.assert_close(out[qkv].double(), expected, rtol=1e-5, atol=1e-5)
    untouched = sorted(set(range(len(LENGTHS) + 2)) - set(problem.qkv_U.tolist()))
    assert (out[untouched] == 7).all()


@pytest.mark.parametrize("num_queries", range(1, 9))
def test_kernel_is_reference_for_every_group_size(
    make_lanes: Callable[..., Any], device: torch.device, num_queries: int
) -> None:
    head_dim, dtype = (64, 80, 128)[num_queries % 3], torch.float32 if num_queries <= 3 else torch.bfloat16
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    problem = Problem(make_lanes, LENGTHS, num_queries, head_dim, dtype)
    check(problem, device, 0, {"rtol": tolerance, "atol": tolerance})


@pytest.mark.parametrize("head_dim", [32, 80, 128])
@pytest.mark.parametrize("window", WINDOWS[1:])
def test_kernel_is_reference_for_every_head_dim_and_window(
    make_lanes: Callable[..., Any], device: torch.device, head_dim: int, window: int
) -> None:
    check(Problem(make_lanes, LENGTHS, 2, head_dim, torch.float32), device, window, {"rtol": 1e-4, "atol": 2e-5})


def test_kernel_is_reference_in_half_precision(make_lanes: Callable[..., Any], device: torch.device) -> None:
    check(Problem(make_lanes, LENGTHS, 2, 128, torch.float16), device, 300, {"rtol": 4e-3, "atol": 4e-3})


def test_a_lane_longer_than_the_smallest_splits(make_lanes: Callable[..., Any], device: torch.device) -> None:
    longest = MIN_SPLIT * MAX_SPLITS + 77
    problem = Problem(make_lanes, [longest, 5, 300], 2, 64, torch.float32)
    check(problem, device, 0, {"rtol": 1e-4, "atol": 2e-5})


def test_many_queries_per_group_and_small_pages(make_lanes: Callable[..., Any], device: torch.device) -> None:
    problem = Problem(lambda *a: make_lanes(*a, page_size=4), [3, 4, 270], 20, 64, torch.float32)
    check(problem, device, 0, {"rtol": 1e-4, "atol": 2e-5})


def test_no_tokens_give_zero(make_lanes: Callable[..., Any], device: torch.device) -> None:
    problem = Problem(make_lanes, [5, 40], 2, 64, torch.float32)
    problem.length_U[0] = 0
    for backend in ("triton", "reference"):
        out = problem.run(device, 0, backend=backend)
        assert (out[int(problem.qkv_U[0])] == 0).all()
        assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [0, 300])
def test_a_lane_alone_is_the_lane_in_a_batch(
    make_lanes: Callable[..., Any], device: torch.device, dtype: torch.dtype, window: int
) -> None:
    """Bit for bit: what is computed for a lane depends on its length and the window alone."""
    problem = Problem(make_lanes, LENGTHS, 4, 64, dtype)
    out = problem.run(device, window, backend="triton")
    for u, (qkv, length) in enumerate(zip(problem.qkv_U.tolist(), problem.length_U.tolist(), strict=True)):
        alone = problem.run(device, window, slice(u, u + 1), max_length=length, backend="triton")
        assert torch.equal(alone[qkv], out[qkv])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_arguments_are_checked(make_lanes: Callable[..., Any], device: torch.device, backend: str) -> None:
    problem = Problem(make_lanes, [5, 40], 2, 64, torch.float32)
    with pytest.raises(ValueError, match="window is -1"):
        problem.run(device, -1, backend=backend)
    problem.length_U = problem.length_U.long()
    with pytest.raises(ValueError, match=r"length_U is torch\.int64"):
        problem.run(device, 0, backend=backend)
    problem.length_U = problem.length_U.int()[:1]
    with pytest.raises(ValueError, match="length_U has shape"):
        problem.run(device, 0, backend=backend)


def test_the_reference_leaves_its_inputs_alone(make_lanes: Callable[..., Any]) -> None:
    problem = Problem(make_lanes, [5, 40], 2, 64, torch.float32)
    q = problem.q_NMD.clone()
    indices, out = (problem.lane_U, problem.qkv_U, problem.length_U), torch.empty(4, 2, 64)
    paged_decode_ref(problem.q_NMD, problem.lanes.pool_2PSD, problem.lanes.page_table_BW, *indices, 0.1, 0, out)
    assert torch.equal(q, problem.q_NMD)


def test_scratch_of_the_caller_is_enough_and_never_grows(make_lanes: Callable[..., Any], device: torch.device) -> None:
    """Whatever is in it; one value less than a call needs is refused, not replaced."""
    problem = Problem(make_lanes, LENGTHS, 3, 64, torch.float32)
    needed = decode_scratch_numel(len(LENGTHS), 3, 64, max(LENGTHS))
    scratch = torch.full((needed,), torch.nan, device=device)
    expected = problem.run(device, 0, backend="triton")
    found = problem.run(device, 0, backend="triton", max_length=max(LENGTHS), scratch=scratch)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=f"scratch has {needed - 1} values; 6 lanes of 520 tokens need {needed}"):
        problem.run(device, 0, backend="triton", max_length=max(LENGTHS), scratch=scratch[1:])


def test_two_threads_never_share_the_results_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the two kernels: both threads have decoded before either merges."""
    meet, own = threading.Barrier(2, timeout=DEADLINE), threading.local()
    partial_out, merged_out = 7, 0  # positions among the arguments

    class Decode:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            def launch(*arguments: Any, **_: Any) -> None:
                arguments[partial_out].fill_(own.value)
                meet.wait()

            return launch

    class Merge:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            def launch(*arguments: Any, **_: Any) -> None:
                meet.wait()
                assert (arguments[merged_out] == own.value).all()

            return launch

    module = importlib.import_module("hetis_kernels.paged_decode")
    monkeypatch.setattr(module, "_paged_decode_kernel", Decode())
    monkeypatch.setattr(module, "_merge_splits_kernel", Merge())

    def decode(value: int) -> None:
        own.value = value
        q_NMD, pool_2PSD = torch.empty(1, 2, 16), torch.empty(2, 20, 32, 16)
        table_BW, index_U = torch.zeros(1, 20, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        length_U = torch.full((1,), 600, dtype=torch.int32)
        paged_decode(
            *(q_NMD, pool_2PSD, table_BW, index_U, index_U, length_U),
            *(1.0, 0, torch.empty_like(q_NMD)),
            backend="triton",
        )

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(decode, value) for value in range(2)]:
            done.result()
