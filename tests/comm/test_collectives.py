"""Sums and gathers are bit-equal to a plain loop, on all ranks, for any split and any transport."""

import itertools
import signal
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import pytest
import torch

from hetis.comm import collectives, shared_reduce
from hetis.comm.collectives import GroupTensorParallel, SingleRank, StagedTensorParallel, TensorParallel
from hetis.comm.process_groups import make_process_group
from hetis.comm.rendezvous import LocalRendezvous, StoreRendezvous
from hetis.comm.shared_reduce import SharedTensorParallel, open_shared
from tests.comm.comm_helpers import CPU, Ranks, together
from tests.processes.look import DEADLINE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_shared(size: int) -> list[TensorParallel]:
    rendezvous = LocalRendezvous()
    return together(*[partial(open_shared, rendezvous, "stage", range(size), i, DEADLINE) for i in range(size)])


def make_gloo(size: int) -> list[TensorParallel]:
    rendezvous, limit = LocalRendezvous(), timedelta(seconds=DEADLINE)

    def join(i: int) -> TensorParallel:
        group = make_process_group(rendezvous, "stage", i, size, CPU, limit, "127.0.0.1")
        joined = GroupTensorParallel(group, range(size))
        joined.connect(CPU)
        return joined

    return together(*[partial(join, i) for i in range(size)])


def make_staged(size: int) -> list[TensorParallel]:
    return [StagedTensorParallel(inner, CPU) for inner in make_shared(size)]


def make_single(size: int) -> list[TensorParallel]:
    assert size == 1
    return [SingleRank()]


GROUPS: list[tuple[Callable[[int], list[TensorParallel]], int]] = [
    *itertools.product([make_shared], [2, 3, 5]),
    *itertools.product([make_gloo], [2, 3]),
    (make_staged, 2),
    (make_single, 1),
]


def random_parts(shape: Sequence[int], size: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).mul_(3.0**rank).to(dtype) for rank in range(size)]


def sum_by_loop(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


@pytest.mark.parametrize(("make", "size"), GROUPS)
def test_all_reduce_is_the_sum_in_rank_order(
    make: Callable[[int], list[TensorParallel]], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that are small, divided among ranks, and larger than a buffer (64 KiB here)."""
    monkeypatch.setattr(shared_reduce, "BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(collectives, "SHARED_SUM_BYTES", 1 << 12)
    groups = make(size)
    for seed, (shape, dtype) in enumerate(itertools.product([(1,), (3, 7), (0, 4), (5, 1000), (3, 11_111)], DTYPES)):
        parts = random_parts(shape, size, dtype, seed)
        expected = sum_by_loop(parts)
        tensors = [part.clone() for part in parts]
        together(*[partial(group.all_reduce, x) for group, x in zip(groups, tensors, strict=True)])
        for x in tensors:
            assert torch.equal(x, expected)
    for group in groups:
        group.close()


@pytest.mark.parametrize(("make", "size"), GROUPS)
def test_columns_of_uneven_widths_are_gathered_on_index_zero(
    make: Callable[[int], list[TensorParallel]], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_reduce, "BUFFER_BYTES", 1 << 12)  # 1024 floats: parts of rows, and several rows
    groups = make(size)
    shapes = [(1, [5, 3, 1, 2, 4]), (7, [100, 0, 37, 1, 64]), (3, [1, 3000, 1500, 0, 7]), (0, [2, 2, 2, 2, 2])]
    for (num_rows, widths), dtype in itertools.product(shapes, [torch.float32, torch.bfloat16]):
        mine = widths[:size]
        whole = random_parts((num_rows, sum(mine)), 1, dtype, num_rows)[0]
        pieces = torch.split(whole, mine, dim=1)  # not contiguous
        found = together(*[partial(g.gather_columns, x, mine) for g, x in zip(groups, pieces, strict=True)])
        assert torch.equal(found[0], whole)
        assert found[1:] == [None] * (size - 1)


@pytest.mark.parametrize(("make", "size"), GROUPS)
def test_all_ranks_get_what_index_zero_broadcasts(
    make: Callable[[int], list[TensorParallel]], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_reduce, "BUFFER_BYTES", 1 << 12)  # 512 token ids
    groups = make(size)
    for count in (1, 3, 0, 511, 2000):
        tensors = [torch.arange(count) + (1 << 40) * (1 + rank) for rank in range(size)]
        expected = tensors[0].clone()
        together(*[partial(group.broadcast, x) for group, x in zip(groups, tensors, strict=True)])
        assert all(torch.equal(x, expected) for x in tensors)
    for group in groups:
        group.close()


def test_ranks_may_run_ahead_but_never_overwrite() -> None:
    """Gathers need nothing back from index 0, so that the other ranks run ahead as far as the buffers permit."""
    groups = make_shared(3)
    steps = 60

    def work(group: TensorParallel, rank: int) -> None:
        for step in range(steps):
            x = torch.full((9, 2), float(step * 3 + rank))
            found = group.gather_columns(x, [2, 2, 2])
            if found is not None:
                assert found[8].tolist() == [step * 3.0 + r for r in (0, 0, 1, 1, 2, 2)]

    together(*[partial(work, group, rank) for rank, group in enumerate(groups)])


def test_a_member_that_leaves_is_an_error_in_waiting_members() -> None:
    first, second = make_shared(2)
    second.close()
    with pytest.raises(ConnectionError, match="rank 1"):
        first.all_reduce(torch.ones(4))


def test_a_member_that_dies_is_an_error_in_waiting_members(monkeypatch: pytest.MonkeyPatch) -> None:
    with Ranks("leave_stage", [1]) as ranks:
        for name, value in {**ranks.environment, "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        group = open_shared(StoreRendezvous.from_environment(30.0), "stage", [0, 1], 0, 30.0)
        assert isinstance(group, SharedTensorParallel)
        x = torch.ones(3)
        group.all_reduce(x)
        assert x.tolist() == [2.0, 2.0, 2.0]
        ranks.processes[1].send_signal(signal.SIGKILL)
        with pytest.raises(ConnectionError, match=r"rank 1 .* SIGKILL"):
            group.all_reduce(x)
        group.close()
