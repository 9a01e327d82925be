"""Measurements of ranks in one process, on a tiny model: structure and plausibility, without assertions on speed."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hetis.comm.rendezvous import LocalRendezvous
from hetis.core.messages import Measure, Measured, MeasureLink, Setup
from hetis.cost.fit import fit_attention, fit_dense, fit_prefill, fit_transfer
from hetis.ranks.measuring.devices import COLD_BYTES, MIN_BYTES, Scratch, affordable, measure_decode, read_bandwidth
from hetis.ranks.primary import PrimaryRank
from hetis.ranks.rank import build_member
from hetis.ranks.worker import AttentionWorker
from tests.checkpoints import make_checkpoint
from tests.engine.local_fleet import LocalFleet
from tests.processes.look import DEADLINE

CPU = torch.device("cpu")
Member = PrimaryRank | AttentionWorker


def build(directory: Path, plan: str) -> tuple[Setup, list[Member]]:
    """All ranks of a fleet that has not computed a step."""
    with LocalFleet(directory, plan, max_num_seqs=8, max_num_batched_tokens=64) as fleet:
        setup = fleet.setup
    rendezvous = LocalRendezvous()
    built = in_parallel(
        *(
            lambda rank=rank: build_member(setup, rank, CPU, rendezvous, lambda error: None)  # type: ignore[misc]
            for rank in range(setup.plan.world_size)
        )
    )
    return setup, built  # type: ignore[return-value]


def in_parallel(*calls: Callable[[], object]) -> list[object]:
    results: list[object] = [None] * len(calls)

    def run(index: int) -> None:
        torch.set_grad_enabled(False)
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "ranks block each other"
    return results


def measure(command: Measure | MeasureLink, *members: Member) -> list[Measured]:
    return in_parallel(*(lambda m=m: m.measurer.measure(command) for m in members))  # type: ignore[misc, return-value]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


def test_every_part_of_a_fleet_can_be_measured_and_fitted(directory: Path) -> None:
    """Two primaries of one stage, and a worker."""
    setup, (first, second, worker) = build(directory, "2+1")
    spec = setup.spec
    for rank, member in ((0, first), (2, worker)):
        [found] = measure(Measure(part="attention", seconds=0.05), member)
        assert (found.rank, found.dense, found.request) == (rank, [], [])
        assert found.seconds > 0
        assert found.read_bytes_per_us > 0
        assert fit_attention(found.attention).time_us(1, 1) > 0
        per_token = spec.kv_bytes_per_token(1, setup.dtype)
        for sample in found.attention:
            lanes = sample.heads // spec.queries_per_group
            assert sample.heads == lanes * spec.queries_per_group
            assert sample.kv_bytes % (lanes * per_token) == 0
            assert sample.time_us > 0
        lengths = {s.kv_bytes // per_token * spec.queries_per_group // s.heads for s in found.attention}
        assert min(lengths) == setup.block_size
        assert max(lengths) <= setup.max_model_len

    one, other = measure(Measure(part="dense", seconds=0.05), first, second)
    assert one.dense == other.dense, "ranks agree on times, and so on when to stop"
    assert [sample.num_tokens for sample in one.dense] == sorted(sample.num_tokens for sample in one.dense)
    assert fit_dense(one.dense, 1000, 4000).time_us(4000, 2000) > 0
    assert len({sample.pairs for sample in one.prefill}) > 2, "a line needs points"
    assert fit_prefill(one.prefill).time_us(max(sample.pairs for sample in one.prefill)) > 0

    command = MeasureLink(primary=1, worker=2, seconds=0.02)
    mine, its = measure(command, second, worker)
    for samples in (mine.request, mine.reply):
        sizes = [sample.num_bytes for sample in samples]
        assert sizes == sorted(sizes)
        assert len(set(sizes)) > 2, "a line needs points"
        assert fit_transfer(samples).time_us(sizes[-1]) > 0
    assert (its.rank, its.request, its.reply) == (2, [], [])
    sent = second.stats().bytes_sent | worker.stats().bytes_sent
    assert set(sent.values()) == {0}, "messages of measurements are not counted"
    for member in (first, second, worker):
        member.close()


def test_a_primary_without_head_groups_measures_layers_and_no_prompts(directory: Path) -> None:
    """It has no links and an empty pool, agrees with the others on times, and its device can be measured."""
    setup, members = build(directory, "3+1")
    *homes, idle = members[:3]
    assert setup.num_pages[2] == 0
    assert (idle.stats().bytes_sent, idle.stats().bytes_received) == ({}, {})
    one, _, its = measure(Measure(part="dense", seconds=0.05), *homes, idle)
    assert its.dense == one.dense
    assert (len(one.prefill) > 0, its.prefill) == (True, [])
    [found] = measure(Measure(part="attention", seconds=0.02), idle)
    assert fit_attention(found.attention).time_us(1, 1000) > 0
    for member in members:
        member.close()


def test_a_worker_of_two_stages_answers_on_both_links(directory: Path) -> None:
    """Each link has a thread in steps; measurements come before these and use another thread."""
    plan = directory / "plan.json"
    plan.write_text('{"stages": [{"layers": 1, "primaries": [{}]}, {"primaries": [{}]}], "attention": [{}]}')
    _, members = build(directory, str(plan))
    for primary in (0, 1):
        [found] = measure(Measure(part="dense", seconds=0.01), members[primary])
        assert (found.rank, bool(found.dense)) == (primary, True)
        mine, its = measure(MeasureLink(primary=primary, worker=2, seconds=0.01), members[primary], members[2])
        assert (mine.rank, bool(mine.request), bool(mine.reply)) == (primary, True, True)
        assert (its.rank, its.request, its.reply) == (2, [], [])
    for member in members:
        member.close()


def test_scratch_pages_are_taken_in_turn(directory: Path) -> None:
    with LocalFleet(directory, "1+0", block_size=4) as fleet:
        setup = fleet.setup
    page_bytes = setup.block_size * setup.spec.kv_bytes_per_token(1, setup.dtype)
    scratch = Scratch(setup, 60 * page_bytes, CPU)
    assert scratch.num_pages == 60
    assert scratch.pool_2PSD.isfinite().all()
    tables = [scratch.take(3, 4 * 4 - 1) for _ in range(5)]
    assert all(table.shape == (3, 4) for table in tables)
    pages = torch.cat(tables).flatten()
    assert sorted(pages.tolist()) == list(range(60)), "each page once before any is repeated"
    assert pages.tolist() != sorted(pages.tolist())
    assert scratch.take(3, 16).equal(tables[0])
    assert read_bandwidth(scratch.pool_2PSD) > 0


@pytest.mark.parametrize("num_pages", [1, 2, 3, 60])
def test_attention_can_be_fitted_with_any_number_of_pages(num_pages: int, directory: Path) -> None:
    with LocalFleet(directory, "1+0", block_size=4) as fleet:
        setup = fleet.setup
    page_bytes = setup.block_size * setup.spec.kv_bytes_per_token(1, setup.dtype)
    scratch = Scratch(setup, num_pages * page_bytes, CPU)
    assert scratch.num_pages == num_pages
    samples = measure_decode(setup, scratch, num_pages, 10.0)
    assert len(samples) >= 12
    assert max(sample.kv_bytes for sample in samples) <= num_pages * page_bytes
    assert fit_attention(samples).time_us(1, page_bytes) > 0


def test_measurements_use_some_memory_even_on_a_full_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, gib = torch.device("cuda"), 1 << 30
    for free, found in ((0, MIN_BYTES), (MIN_BYTES, MIN_BYTES), (100 << 20, 50 << 20), (80 * gib, COLD_BYTES)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 * gib))
        assert affordable(COLD_BYTES, gpu) == found
    assert affordable(COLD_BYTES, CPU) == COLD_BYTES
