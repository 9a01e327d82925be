"""Who measures what and when, on fleets that know the truth about themselves."""

from collections.abc import Iterable, Mapping
from random import Random

import msgspec
import pytest

from hetis.core.fleet import DeviceInfo
from hetis.core.messages import Measure, Measured, MeasureLink, Setup
from hetis.core.plan import Plan, resolve_plan
from hetis.core.profile import DeviceProfile, FleetProfile, ProfileKey
from hetis.core.samples import AttentionSample, DenseSample, PrefillSample, TransferSample
from hetis.cost.memory import usable_share
from hetis.engine.profiling import Profiling, links_of, profile_key, report_of
from tests.dispatcher.fleets import make_spec

SPEC = msgspec.structs.replace(make_spec(4, num_layers=4), intermediate_size=128, vocab_size=512, max_position=256)


def make_plan(homes: list[int], num_workers: int) -> Plan:
    """Stages of so many primaries each, one layer per stage, then workers."""
    plan = resolve_plan(f"{homes[0]}+{num_workers}", SPEC)
    first, workers = plan.stages[0].primaries, plan.workers
    stages, rank = [], 0
    for index, count in enumerate(homes):
        primaries = resolve_plan(f"{count}+0", SPEC).stages[0].primaries
        numbered = tuple(msgspec.structs.replace(p, rank=rank + i) for i, p in enumerate(primaries))
        stages.append(msgspec.structs.replace(plan.stages[0], layers=(index, index + 1), primaries=numbered))
        rank += count
    assert len(first) == homes[0]
    numbered_workers = tuple(msgspec.structs.replace(worker, rank=rank + i) for i, worker in enumerate(workers))
    return Plan(stages=tuple(stages), workers=numbered_workers)


class Fleet:
    """Ranks that answer when they are told to. Checks that nobody disturbs anybody."""

    def __init__(self, plan: Plan, where: list[tuple[str, str, str]]) -> None:
        """`where`: host, device and name of each rank."""
        infos = [
            DeviceInfo(
                rank=rank,
                device=device,
                name=name,
                host=host,
                address="",
                pid=rank,
                num_threads=1,
                total_memory=1 << 30,
                free_memory=(1 << 20) * (rank + 1),
                driver="1",
                backend="test",
            )
            for rank, (host, device, name) in enumerate(where)
        ]
        assert len(infos) == plan.world_size
        self.setup = Setup(
            spec=SPEC, plan=plan, fleet=infos, model=None, revision=None, load_format="auto", dtype="float32",
            block_size=16, num_pages={}, pages_per_haul=1, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256,
            seed=0, enforce_eager=False, eos_token_ids=[], logprobs_mode="raw_logprobs", step_timeout=60.0, trace=False,
        )  # fmt: skip
        self.asked: list[tuple[int, Measure | MeasureLink]] = []

    def key(self, rank: int) -> ProfileKey:
        return profile_key(self.setup.fleet[rank], self.setup)

    def run(self, known: Mapping[ProfileKey, DeviceProfile] | None = None, *, share: bool = True) -> Profiling:
        """Answers come in random order."""
        rng, profiling = Random(0), Profiling(self.setup, known or {}, share=share)
        busy: dict[int, Measure | MeasureLink] = {}
        self.asked = []
        self._note(busy, profiling.start())
        while busy:
            rank = rng.choice(sorted(busy))
            self._note(busy, profiling.on_measured(self.answer(rank, busy.pop(rank))))
        assert profiling.is_finished
        return profiling

    def _note(self, busy: dict[int, Measure | MeasureLink], sent: Iterable[tuple[int, Measure | MeasureLink]]) -> None:
        for rank, message in sent:
            assert rank not in busy, "a rank does one thing at a time"
            busy[rank] = message
            self.asked.append((rank, message))
        for rank, message in busy.items():
            for other, its in busy.items():
                assert rank == other or not self.disturbs(rank, message, other, its), (rank, message, other, its)

    def disturbs(self, rank: int, message: Measure | MeasureLink, other: int, its: Measure | MeasureLink) -> bool:
        if message is its:  # one measurement of several ranks
            return False
        here, there = self.setup.fleet[rank], self.setup.fleet[other]
        if isinstance(message, MeasureLink) or isinstance(its, MeasureLink):
            return here.host == there.host or type(message) is not type(its)
        return (here.host, here.device) == (there.host, there.device)

    def answer(self, rank: int, message: Measure | MeasureLink) -> Measured:
        """Times in proportion to the rank's number."""
        slow = float(rank + 1)
        sizes = [2**k for k in range(4, 16)]
        if isinstance(message, MeasureLink):
            ways = [TransferSample(n, slow * (10 + 1e-3 * n)) for n in sizes] if rank == message.primary else []
            return Measured(rank=rank, seconds=0.2, request=ways, reply=ways)
        if message.part == "attention":
            points = [(h, n) for h in (2, 8, 32, 128) for n in (1000, 50_000, 1_000_000)]
            times = [AttentionSample(h, n, slow * (5 + 0.1 * h + 1e-4 * n)) for h, n in points]
            return Measured(rank=rank, seconds=2.0, read_bytes_per_us=100 / slow, attention=times)
        dense = [DenseSample(n, slow * max(10.0, 0.5 * n)) for n in sizes]
        return Measured(rank=rank, seconds=1.0, dense=dense, prefill=[PrefillSample(n, slow * n) for n in sizes])

    def who(self, part: str) -> list[int]:
        """Ranks that were asked, in order."""
        return [rank for rank, m in self.asked if isinstance(m, Measure) and m.part == part]

    def links(self) -> list[tuple[int, int]]:
        """That were measured; both ends must have been asked."""
        messages = [(rank, m) for rank, m in self.asked if isinstance(m, MeasureLink)]
        assert [rank for rank, _ in messages] == [end for _, m in messages[::2] for end in (m.primary, m.worker)]
        return [(m.primary, m.worker) for _, m in messages[::2]]


CPU = ("a", "cpu", "small")


def test_ranks_of_one_key_are_measured_once_and_links_each() -> None:
    fleet = Fleet(make_plan([1], 3), [CPU, CPU, ("b", "cpu", "small"), ("b", "cpu", "large")])
    profiling = fleet.run()
    assert fleet.who("attention") == [0, 3]
    assert fleet.who("dense") == [0]
    assert sorted(fleet.links()) == [(0, 1), (0, 2), (0, 3)]
    report = profiling.report()
    assert report.profile is not None
    devices = report.profile.devices
    assert [devices[rank].attention.c_us for rank in range(4)] == pytest.approx([5.0, 5.0, 5.0, 20.0])
    assert [devices[rank].read_bytes_per_us for rank in range(4)] == [100, 100, 100, 25]
    assert [devices[rank].usable_bytes for rank in range(4)] == [
        int((rank + 1 << 20) * usable_share("cpu")) for rank in range(4)
    ], "memory is each rank's own"
    assert devices[0].dense is not None
    assert [devices[rank].dense for rank in (1, 2, 3)] == [None] * 3
    assert report.sources == {0: "measured in 3.0 s", 1: "as rank 0", 2: "as rank 0", 3: "measured in 2.0 s"}
    assert [(link.primary, link.worker) for link in report.profile.links] == [(0, 1), (0, 2), (0, 3)]
    assert report.profile.links[0].request.alpha_us == pytest.approx(10.0)
    assert {profile.key: profile.dense is not None for profile in profiling.new()} == {
        fleet.key(0): True,
        fleet.key(3): False,
    }


def test_without_sharing_every_rank_is_measured_by_itself_and_in_turn() -> None:
    fleet = Fleet(make_plan([1], 2), [CPU, CPU, CPU])
    profiling = fleet.run(share=False)
    assert fleet.who("attention") == [0, 1, 2]
    report = profiling.report()
    assert report.profile is not None
    assert [report.profile.devices[rank].attention.c_us for rank in range(3)] == pytest.approx([5.0, 10.0, 15.0])
    assert set(report.sources.values()) == {"measured in 3.0 s", "measured in 2.0 s"}


def test_gpus_and_hosts_measure_at_the_same_time() -> None:
    fleet = Fleet(
        make_plan([1], 4),
        [
            ("a", "cuda:0", "big"),
            ("a", "cuda:1", "old"),
            ("a", "cpu", "small"),
            ("b", "cpu", "large"),
            ("b", "cpu", "odd"),
        ],
    )
    profiling = Profiling(fleet.setup, {}, share=True)
    first = profiling.start()
    assert [rank for rank, _ in first] == [0, 1, 2, 3], "rank 4 has to wait for its host's cores"
    assert [rank for rank, _ in profiling.on_measured(fleet.answer(3, first[3][1]))] == [4]
    fleet.run()
    assert len(fleet.links()) == 4


def test_primaries_of_a_stage_are_measured_together() -> None:
    """Two kinds of devices in one stage; the second stage has nothing new, the third splits its layer otherwise."""
    where = [("a", "cuda:0", "big"), ("a", "cuda:1", "old"), ("b", "cuda:0", "big"), ("b", "cuda:1", "big")]
    fleet = Fleet(make_plan([2, 2, 1], 1), [*where, ("c", "cuda:0", "big"), ("c", "cpu", "small")])
    profiling = fleet.run()
    assert fleet.who("attention") == [0, 1, 5]
    assert sorted(fleet.who("dense")) == [0, 1, 4]
    place = [rank for rank, _ in fleet.asked].index(1, 2)
    assert [rank for rank, _ in fleet.asked[place - 1 : place + 1]] == [0, 1], "both are told at the same time"
    report = profiling.report()
    assert report.profile is not None
    dense = [report.profile.devices[rank].dense for rank in range(5)]
    assert [found.num_ranks for found in dense if found is not None] == [2, 2, 2, 2, 1]
    assert dense[0] == dense[2] == dense[3] != dense[1]
    assert report.profile.links[-1].worker == 5
    assert len(fleet.links()) == 5


def test_what_the_cache_knows_is_not_measured_again() -> None:
    fleet = Fleet(make_plan([1], 2), [CPU, CPU, ("b", "cpu", "large")])
    known = {profile.key: profile for profile in fleet.run().new()}
    assert known.keys() == {fleet.key(0), fleet.key(2)}
    again = fleet.run(known)
    assert fleet.who("attention") == fleet.who("dense") == []
    assert sorted(fleet.links()) == [(0, 1), (0, 2)], "links are cheap, and depend on where ranks run"
    assert again.new() == []
    report = again.report()
    assert report.sources == dict.fromkeys(range(3), "cache")
    assert report.profile is not None
    assert report.profile.devices[1].attention == known[fleet.key(0)].attention
    assert report.profile.devices[1].dense is None


def test_a_cached_worker_lacks_the_layers_and_another_split_needs_them_anew() -> None:
    fleet = Fleet(make_plan([1], 0), [CPU])
    [whole] = fleet.run().new()
    assert whole.dense is not None
    worker = msgspec.structs.replace(whole, dense=None, prefill=None)
    profiling = fleet.run({whole.key: worker})
    assert (fleet.who("attention"), fleet.who("dense")) == ([], [0])
    assert profiling.new()[0].dense == whole.dense
    split = Fleet(make_plan([2], 0), [CPU, CPU])
    profiling = split.run({whole.key: whole})
    assert (split.who("attention"), split.who("dense")) == ([], [0, 1])
    [new] = profiling.new()
    assert new.dense is not None
    assert new.dense.num_ranks == 2
    assert new.attention == whole.attention


def test_a_fleet_without_workers_has_no_links() -> None:
    fleet = Fleet(make_plan([1], 0), [CPU])
    report = fleet.run().report()
    assert report.profile is not None
    assert (list(report.profile.devices), report.profile.links) == ([0], ())


# --- profiles from files ----------------------------------------------------------------------------------------------


def full_profile(fleet: Fleet) -> FleetProfile:
    profile = fleet.run().report().profile
    assert profile is not None
    return profile


def test_a_file_that_has_everything_is_used_as_it_is() -> None:
    fleet = Fleet(make_plan([1], 2), [CPU, CPU, CPU])
    profile = full_profile(fleet)
    report = report_of(profile, fleet.setup.plan, "fleet.json")
    assert report.profile == profile
    assert set(report.sources.values()) == {"fleet.json"}


@pytest.mark.parametrize(
    ("without", "lacking"),
    [
        ("rank", r"fleet\.json lacks rank 1"),
        ("layers", r"lacks layers of rank 0"),
        ("link", r"lacks link 0->2"),
    ],
)
def test_what_a_file_lacks_is_named(without: str, lacking: str) -> None:
    fleet = Fleet(make_plan([1], 2), [CPU, CPU, CPU])
    profile = full_profile(fleet)
    devices, links = dict(profile.devices), list(profile.links)
    if without == "rank":
        del devices[1]
    elif without == "layers":
        devices[0] = msgspec.structs.replace(devices[0], dense=None)
    else:
        links.pop()
    with pytest.raises(ValueError, match=lacking):
        report_of(FleetProfile(devices=devices, links=tuple(links)), fleet.setup.plan, "fleet.json")


def test_links_of_all_stages() -> None:
    assert links_of(make_plan([1, 2], 2)) == [(0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)]
    assert links_of(make_plan([1], 0)) == []
