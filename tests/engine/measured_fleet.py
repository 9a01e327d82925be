"""Simulated ranks of known speed, which answer when they are asked to measure."""

from collections.abc import Iterable, Mapping
from random import Random

import msgspec

from hetis.core.device_info import DeviceInfo
from hetis.core.measurements import AttentionSample, DenseSample, PrefillSample, TransferSample
from hetis.core.messages import Measure, Measured, MeasureLink, Setup
from hetis.core.plan import Plan
from hetis.core.plan_sources import resolve_plan
from hetis.core.profile import KindProfile, ProfileKey
from hetis.driver.profiling import Profiling, profile_key
from tests.dispatcher.fleets import make_spec

SPEC = msgspec.structs.replace(make_spec(4, num_layers=4), intermediate_size=128, vocab_size=512, max_position=256)


def make_plan(homes: list[int], num_workers: int) -> Plan:
    """`homes`: number of primaries of each stage; one layer per stage, then workers."""
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


def answer(rank: int, message: Measure | MeasureLink) -> Measured:
    """The measurement of a rank, whose times are proportional to its number plus one."""
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


class Fleet:
    """Ranks that answer measurements. Checks that no measurement disturbs another."""

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
            block_size=16, num_pages={}, max_transfer_pages=1, max_num_seqs=8, max_num_batched_tokens=64,
            max_model_len=256, seed=0, enforce_eager=False, eos_token_ids=[], logprobs_mode="raw_logprobs",
            step_timeout=60.0, trace=False,
        )  # fmt: skip
        self.asked: list[tuple[int, Measure | MeasureLink]] = []

    def key(self, rank: int) -> ProfileKey:
        return profile_key(self.setup.fleet[rank], self.setup)

    def run(self, known: Mapping[ProfileKey, KindProfile] | None = None, *, share: bool = True) -> Profiling:
        """A whole profiling; ranks answer in random order."""
        rng, profiling = Random(0), Profiling(self.setup, known or {}, share=share)
        busy: dict[int, Measure | MeasureLink] = {}
        self.asked = []
        self._note(busy, profiling.start())
        while busy:
            rank = rng.choice(sorted(busy))
            self._note(busy, profiling.on_measured(answer(rank, busy.pop(rank))))
        assert profiling.is_finished
        return profiling

    def _note(self, busy: dict[int, Measure | MeasureLink], sent: Iterable[tuple[int, Measure | MeasureLink]]) -> None:
        for rank, message in sent:
            assert rank not in busy, "a rank does one thing at a time"
            busy[rank] = message
            self.asked.append((rank, message))
        for rank, message in busy.items():
            for other, second in busy.items():
                assert rank == other or not self.disturbs(rank, message, other, second), (rank, message, other, second)

    def disturbs(self, rank: int, message: Measure | MeasureLink, other: int, second: Measure | MeasureLink) -> bool:
        if message is second:  # one measurement of several ranks
            return False
        here, there = self.setup.fleet[rank], self.setup.fleet[other]
        if isinstance(message, MeasureLink) or isinstance(second, MeasureLink):
            return here.host == there.host or type(message) is not type(second)
        return (here.host, here.device) == (there.host, there.device)

    def who(self, part: str) -> list[int]:
        """Ranks that were asked to measure that part, in order."""
        return [rank for rank, m in self.asked if isinstance(m, Measure) and m.part == part]

    def links(self) -> list[tuple[int, int]]:
        """Links that were measured; both ends must have been asked."""
        messages = [(rank, m) for rank, m in self.asked if isinstance(m, MeasureLink)]
        assert [rank for rank, _ in messages] == [end for _, m in messages[::2] for end in (m.primary, m.worker)]
        return [(m.primary, m.worker) for _, m in messages[::2]]
