"""The C++ attention and cache operations against their references, on every instruction set that this processor has."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hetis_kernels.kv_append import kv_append, kv_append_ref
from hetis_kernels.lane_pack import lane_pack, lane_unpack
from hetis_kernels.page_copy import page_gather, page_scatter
from hetis_kernels.paged_decode import paged_decode
from hetis_kernels.varlen_prefill import paged_prefill

SPLIT = 256  # tokens of a lane that the decode kernel handles at once


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if torch.ops.hetis.limit_dense_isa(request.param) != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    torch.ops.hetis.limit_dense_isa("avx512_bf16")


def on_every_isa(run: Callable[[], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Results by instruction set, so that many can be compared with one (slow) reference."""
    for name in ("portable", "avx2", "avx512", "avx512_bf16"):
        if torch.ops.hetis.limit_dense_isa(name) == name:
            yield name, run()
    torch.ops.hetis.limit_dense_isa("avx512_bf16")


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """One thread, as references of many tiny operations are ten times slower on two; or as many as a test asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Decode:
    """A decode call with shuffled lanes, queries inside fused QKV, and entries of q that no lane names."""

    def __init__(
        self, make_lanes: Any, lengths: list[int], queries: int, dim: int, dtype: torch.dtype, page: int
    ) -> None:
        num_lanes, num_entries = len(lengths), len(lengths) + 2
        self.lanes = make_lanes(lengths, dim, dtype, page_size=page)
        self.q_NMD = torch.randn(num_entries, queries + 2, dim).to(dtype)[:, :queries]
        self.lane_U = torch.randperm(num_lanes).int()
        self.qkv_U = torch.randperm(num_entries)[:num_lanes].int()
        self.length_U = torch.tensor(lengths).int()[self.lane_U.long()]

    def run(
        self, backend: Any, window: int = 0, chosen: slice = slice(None), scale: float | None = None
    ) -> torch.Tensor:
        """out, with 7 in every place that was not written."""
        out = torch.full(self.q_NMD.shape, 7.0, dtype=self.q_NMD.dtype)
        indices = (self.lane_U[chosen], self.qkv_U[chosen], self.length_U[chosen])
        scale = self.q_NMD.shape[2] ** -0.5 if scale is None else scale
        pool, table = self.lanes.pool_2PSD, self.lanes.page_table_BW
        paged_decode(self.q_NMD, pool, table, *indices, scale, window, out, backend=backend)
        return out


class Prefill:
    """Chunks of prompts, one lane for each (chunk, group)."""

    def __init__(
        self,
        make_lanes: Any,
        chunks: list[tuple[int, int]],
        groups: int,
        queries: int,
        dim: int,
        dtype: torch.dtype,
        page: int,
    ) -> None:
        self.lanes = make_lanes([context for _, context in chunks for _ in range(groups)], dim, dtype, page_size=page)
        shuffle = torch.randperm(len(chunks) * groups)
        self.table = self.lanes.page_table_BW[shuffle]
        self.lane_CG = shuffle.argsort().int().view(len(chunks), groups)
        self.new_C = torch.tensor([new for new, _ in chunks])
        self.context_C = torch.tensor([context for _, context in chunks]).int()
        self.q_TGMD = torch.randn(int(self.new_C.sum()), groups, queries + 2, dim).to(dtype)[:, :, :queries]

    def run(self, backend: Any, window: int = 0) -> torch.Tensor:
        start = torch.cat([torch.zeros(1), self.new_C.cumsum(0)]).int()
        return self.call(backend, window, self.q_TGMD, start, self.lane_CG, self.context_C)

    def call(self, backend: Any, window: int, q_TGMD: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
        out = torch.full(q_TGMD.shape, 7.0, dtype=q_TGMD.dtype)
        scale = q_TGMD.shape[3] ** -0.5
        paged_prefill(q_TGMD, self.lanes.pool_2PSD, self.table, *indices, scale, window, out, backend=backend)
        return out


def close(result: torch.Tensor, expected: torch.Tensor, tolerance: dict[str, float], isa: str) -> None:
    torch.testing.assert_close(result, expected, **tolerance, msg=f"on {isa}: {{}}".format)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_decode_is_reference(make_lanes: Any, dtype: torch.dtype, tolerance: dict[str, float], head_dim: int) -> None:
    for i, queries in enumerate([1, 2, 3, 8, 15]):
        page = (16, 8, 32, 5, 64)[i]
        lengths = [1, page - 1, page, page + 1, SPLIT, SPLIT + 1, 2 * SPLIT + 77]
        problem = Decode(make_lanes, lengths, queries, head_dim, dtype, page)
        for window in ((0, 33), (0, 300), (1, 270), (0, 17), (0, SPLIT))[i]:
            expected = problem.run("reference", window)
            for isa, result in on_every_isa(lambda: problem.run("cpu", window)):  # noqa: B023
                close(result, expected, tolerance, isa)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_prefill_is_reference(make_lanes: Any, dtype: torch.dtype, tolerance: dict[str, float], head_dim: int) -> None:
    chunks = [(1, 1), (1, 64), (64, 64), (65, 65), (3, 67), (50, 130), (17, 33)]
    for i, queries in enumerate([1, 2, 3, 8]):
        problem = Prefill(make_lanes, chunks, 2, queries, head_dim, dtype, (16, 5, 64, 8)[i])
        for window in ((0, 1), (0, 33), (0, 70), (0, 64))[i]:
            expected = problem.run("reference", window)
            for isa, result in on_every_isa(lambda: problem.run("cpu", window)):  # noqa: B023
                close(result, expected, tolerance, isa)


def test_many_queries_share_one_lane(make_lanes: Any, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    decode = Decode(make_lanes, [3, 300], 64, 64, dtype, 16)
    expected = decode.run("reference")
    for isa, result in on_every_isa(lambda: decode.run("cpu")):
        close(result, expected, tolerance, isa)
    prefill = Prefill(make_lanes, [(5, 70)], 1, 64, 64, dtype, 16)
    expected = prefill.run("reference")
    for isa, result in on_every_isa(lambda: prefill.run("cpu")):
        close(result, expected, tolerance, isa)


@pytest.mark.parametrize("scale", [-0.3, 30.0])
def test_scores_far_apart_and_a_negative_scale(make_lanes: Any, scale: float) -> None:
    problem = Decode(make_lanes, [20, 600], 2, 64, torch.float32, 16)
    expected = problem.run("reference", scale=scale)
    for isa, result in on_every_isa(lambda: problem.run("cpu", scale=scale)):
        close(result, expected, {"rtol": 1e-3, "atol": 1e-4}, isa)


def test_no_tokens_give_zero(make_lanes: Any, isa: str, dtype: torch.dtype) -> None:
    problem = Decode(make_lanes, [5, 40], 2, 64, dtype, 16)
    problem.length_U[0] = 0
    out = problem.run("cpu")
    assert (out[problem.qkv_U[0]] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("window", [0, 300])
def test_a_lane_alone_is_the_lane_in_a_batch(
    make_lanes: Any, isa: str, dtype: torch.dtype, threads: Callable[[int], None], window: int
) -> None:
    """Bit for bit, on one thread as on three."""
    problem = Decode(make_lanes, [1, 17, SPLIT, SPLIT + 1, 900, 2000], 3, 64, dtype, 16)
    threads(3)
    batch = problem.run("cpu", window)
    threads(1)
    assert torch.equal(batch, problem.run("cpu", window))
    for u, qkv in enumerate(problem.qkv_U.tolist()):
        alone = problem.run("cpu", window, slice(u, u + 1))
        assert torch.equal(alone[qkv], batch[qkv])


@pytest.mark.parametrize("window", [0, 100])
def test_where_a_prompt_is_cut_into_chunks_changes_nothing(
    make_lanes: Any, isa: str, dtype: torch.dtype, threads: Callable[[int], None], window: int
) -> None:
    """Bit for bit: the prompt at once, in uneven chunks, beside another prompt, on one thread or three."""
    problem = Prefill(make_lanes, [(300, 300), (40, 80)], 2, 3, 64, dtype, 16)
    threads(3)
    out = problem.run("cpu", window)
    threads(1)
    start = 0
    for new in (1, 129, 63, 107):
        indices = torch.tensor([0, new]).int(), problem.lane_CG[:1], torch.tensor([start + new]).int()
        chunk = problem.call("cpu", window, problem.q_TGMD[start : start + new], *indices)
        assert torch.equal(chunk, out[start : start + new])
        start += new


def test_the_page_size_changes_nothing(make_lanes: Any, isa: str, dtype: torch.dtype) -> None:
    results = []
    for page in (4, 64):
        torch.manual_seed(1)
        problem = Decode(make_lanes, [700], 2, 80, dtype, page)
        for half, values in zip(problem.lanes.pool_2PSD, (problem.lanes.k[0], problem.lanes.v[0]), strict=True):
            torch.manual_seed(2)
            values.copy_(torch.randn(700, 80))
            token = torch.arange(700)
            half[problem.lanes.page_table_BW[0, token // page].long(), token % page] = values
        problem.q_NMD = torch.randn(3, 2, 80).to(dtype)
        problem.qkv_U[0] = 1
        results.append(problem.run("cpu", 650))
    assert torch.equal(*results)


@pytest.mark.parametrize("num_vectors", [0, 1, 3000])  # the last is shared by threads
def test_copies_are_copies(dtype: torch.dtype, num_vectors: int) -> None:
    vectors = torch.randn(num_vectors + 3, 5, 64).to(dtype)
    qkv = torch.randperm(num_vectors + 3)[:num_vectors].int()
    k_ND, v_ND = vectors[:, 3], vectors[:, 4]
    pool, expected = (torch.full((2, num_vectors + 1, 4, 64), torch.nan, dtype=dtype) for _ in range(2))
    cell = torch.randperm(4 * num_vectors + 4)[:num_vectors]
    kv_append(k_ND, v_ND, pool, qkv, cell, backend="cpu")
    kv_append_ref(k_ND, v_ND, expected, qkv, cell)
    torch.testing.assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)

    packed = torch.empty(num_vectors, 130, dtype=dtype)[:, :128]
    lane_pack(vectors.flatten(1)[:, 64:192], qkv, packed, backend="cpu")
    assert torch.equal(packed, vectors.flatten(1)[qkv.long(), 64:192])
    unpacked = torch.zeros_like(vectors)
    lane_unpack(packed, qkv, unpacked.flatten(1)[:, 64:192], backend="cpu")
    assert torch.equal(unpacked[qkv.long(), 1:3], vectors[qkv.long(), 1:3])
    assert unpacked.count_nonzero() == packed.count_nonzero()


@pytest.mark.parametrize("num_pages", [0, 1, 30])
def test_pages_travel(dtype: torch.dtype, num_pages: int) -> None:
    pool = torch.randn(3, 2, 40, 16, 64).to(dtype)
    page = torch.randperm(40)[:num_pages].int()
    buffer = torch.empty(num_pages, 3, 2, 16, 64, dtype=dtype)
    page_gather(pool, page, buffer, backend="cpu")
    assert torch.equal(buffer, pool[:, :, page.long()].permute(2, 0, 1, 3, 4))
    elsewhere, expected = torch.zeros_like(pool), torch.zeros_like(pool)
    expected[:, :, page.long()] = pool[:, :, page.long()]
    page_scatter(buffer, page, elsewhere, backend="cpu")
    assert torch.equal(elsewhere, expected)


def test_operations_check_what_would_break_memory(make_lanes: Any) -> None:
    problem = Decode(make_lanes, [5, 40], 2, 64, torch.float32, 16)
    pool, table = problem.lanes.pool_2PSD, problem.lanes.page_table_BW
    out, indices = torch.empty(4, 2, 64), [problem.lane_U, problem.qkv_U, problem.length_U]

    def call(**changed: Any) -> None:
        given = {
            "q": problem.q_NMD,
            "pool": pool,
            "table": table,
            "indices": indices,
            "window": 0,
            "out": out,
        } | changed
        paged_decode(
            *(given["q"], given["pool"], given["table"], *given["indices"], 0.1, given["window"], given["out"]),
            backend="cpu",
        )

    call()
    for changed, message in [
        ({"pool": pool.bfloat16()}, "pool must be a CPU tensor of 4 dimensions, of dtype Float"),
        ({"pool": pool.transpose(1, 2)}, "contiguous halves"),
        ({"table": table.long()}, "page_table must be a contiguous int32"),
        ({"indices": [*indices[:2], indices[2][:1]]}, "do not fit together"),
        ({"out": torch.empty(4, 3, 64)}, "do not fit together"),
        ({"indices": [problem.lane_U + 1, *indices[1:]]}, "an index is out of range"),
        ({"indices": [*indices[:2], problem.length_U + 60]}, "an index is out of range"),
        ({"window": -1}, "window is -1; use 0"),
        ({"q": problem.q_NMD.double(), "pool": pool.double(), "out": out.double()}, "use float32, bfloat16 or float16"),
        (
            {"q": torch.empty(4, 2, 24), "pool": pool[..., :24].contiguous(), "out": torch.empty(4, 2, 24)},
            "multiple of 16",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**changed)


def test_products_are_counted_on_all_threads(isa: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """The measure of what arithmetic allows (`bench/bench_cpu_attention.py`) does what it says it did."""
    like = torch.empty(0, dtype=dtype)
    one = torch.ops.hetis.attention_products(like, 3)
    assert one > 0
    assert torch.ops.hetis.attention_products(like, 6) == 2 * one
    threads(2)
    assert torch.ops.hetis.attention_products(like, 3) == 2 * one
