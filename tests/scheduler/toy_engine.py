"""An engine without a model: the real scheduler, dispatcher and cache, with the ranks of `toy_ranks.py`."""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

import msgspec

from hetis.cache.cache_manager import CacheManager
from hetis.cache.migration import Migrator
from hetis.core.batch import Batch, Row
from hetis.core.placement import Dispatcher, Move, PoolId, Relief, pages_for
from hetis.core.plan import AttentionWorker, Plan, Primary, Stage
from hetis.core.request import Sequence
from hetis.core.sampling_params import SamplingParams
from hetis.core.spans import spans
from hetis.cost.memory import largest_context
from hetis.dispatcher.simple_dispatchers import ProportionalDispatcher
from hetis.scheduler.scheduler import Scheduler
from tests.scheduler.toy_ranks import VOCABULARY, Command, FakeRow, FakeStage, next_token


def make_plan(groups: list[list[int]], num_workers: int = 0) -> Plan:
    """A plan with these head groups per primary, stage by stage."""
    stages, rank = [], 0
    for index, counts in enumerate(groups):
        primaries = []
        for span in spans(counts):
            primaries.append(Primary(rank=rank, device="cpu", groups=span, mlp_columns=(0, 1), vocab_rows=(0, 1)))
            rank += 1
        stages.append(Stage(layers=(index, index + 1), primaries=tuple(primaries)))
    workers = tuple(AttentionWorker(rank=rank + index, device="cpu") for index in range(num_workers))
    return Plan(stages=tuple(stages), workers=workers)


def at_depths(groups: Iterable[list[list[int]]]) -> list[tuple[list[list[int]], int]]:
    """Parameters (groups of a plan, depth): every plan at depth 0, plans of one stage at depth 1 as well."""
    return [(each, depth) for each in groups for depth in ((0, 1) if len(each) == 1 else (0,))]


def make_sequence(
    arrival: int, prompt_len: int, max_tokens: int, stop_ids: frozenset[int] = frozenset(), **params: object
) -> Sequence:
    prompt = [(arrival * 5 + position) % VOCABULARY for position in range(prompt_len)]
    return Sequence(
        id=f"s{arrival}",
        token_ids=prompt,
        prompt_len=prompt_len,
        params=msgspec.structs.replace(SamplingParams(), **params),
        max_tokens=max_tokens,
        seed=0,
        stop_ids=stop_ids,
        arrival=arrival,
    )


def alone(sequence: Sequence, max_model_len: int) -> list[int]:
    """All tokens that `sequence` ends with if it runs undisturbed. Call it before the sequence runs."""
    tokens = list(sequence.token_ids)
    while len(tokens) < min(sequence.prompt_len + sequence.max_tokens, max_model_len):
        tokens.append(next_token(tokens[-1], len(tokens)))
        if tokens[-1] in sequence.stop_ids:
            break
    return tokens


@dataclass
class ToyEngine:
    """Call `step` until `has_work` is false. `random` decides in which order stages get on."""

    plan: Plan
    num_pages: dict[int, int]
    page_size: int = 4
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 32
    max_model_len: int | None = None
    random: Random = field(default_factory=lambda: Random(0))
    dispatcher: Dispatcher = field(default_factory=ProportionalDispatcher)
    make_relief: Callable[["ToyEngine"], Relief | None] = lambda _: None
    max_transfer_pages: int = 2
    moves_per_step: float = 0.0
    depth: int = 0  # steps scheduled ahead; of no effect with several stages

    def __post_init__(self) -> None:
        num_groups = self.plan.num_groups
        capacity = largest_context(self.plan, self.num_pages, self.page_size)
        self.max_model_len = self.max_model_len or capacity
        assert self.max_model_len <= capacity
        self.cache = CacheManager(self.plan, num_groups, self.num_pages, self.page_size, self.max_num_seqs)
        self.migrator = Migrator(self.cache, self.plan, num_groups, self.page_size, 1, self.max_transfer_pages)
        self.relief = self.make_relief(self)
        self.scheduler = Scheduler(
            self.cache,
            self.dispatcher,
            self.relief,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            num_stages=len(self.plan.stages),
            depth=self.depth,
        )
        self.depth = self.depth if len(self.plan.stages) == 1 else 0
        self.stages = [
            FakeStage(index, self.plan, num_groups, self.num_pages, self.page_size)
            for index in range(len(self.plan.stages))
        ]
        self.pipeline: list[deque[Command]] = [deque() for _ in self.stages]
        self.slots_in_use: set[int] = set()
        self.batches: list[Batch] = []
        self.finished: list[Sequence] = []
        self.started: list[Move] = []
        self.committed: list[Move] = []

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def run(self, limit: int = 100_000) -> None:
        """Steps until nothing is left to do."""
        for _ in range(limit):
            if not self.has_work:
                return
            self.step()
        raise AssertionError(f"not done after {limit} steps")

    def serve(self, sequences: list[Sequence]) -> None:
        """Runs all of them, from an empty fleet to an empty one; each must end as if it had been alone."""
        assert self.max_model_len is not None
        expected = [alone(sequence, self.max_model_len) for sequence in sequences]
        for sequence in sequences:
            self.scheduler.add(sequence)
        self.run()
        self.check_idle()
        assert [sequence.token_ids for sequence in sequences] == expected

    def step(self) -> None:
        """Sends all batches there are, then lets one stage compute one."""
        self._start_moves()
        while (batch := self._schedule()) is not None:
            self._send(batch)
        self.cache.check_integrity()
        busy = [index for index, queue in enumerate(self.pipeline) if queue]
        assert busy, "there is work but nothing runs"
        index = self.random.choice(busy)
        command = self.pipeline[index].popleft()
        tokens = self.stages[index].run(command)
        if index + 1 < len(self.stages):
            self.pipeline[index + 1].append(command)
        else:
            self._finish(command.batch, tokens)
        self.cache.check_integrity()
        self._check_pages()

    def _check_pages(self) -> None:
        """While no lane migrates, pools hold the lanes that live there, the staging of prompts, and nothing else."""
        if self.migrator.is_busy:
            return
        used: Counter[PoolId] = Counter()
        for sequence in self.scheduler.running:
            pages = pages_for(self.cache.num_tokens(sequence.slot), self.page_size)
            staged = pages_for(len(sequence.token_ids), self.page_size)
            for index, owners in enumerate(self.cache.owners(sequence.slot)):
                for group, owner in enumerate(owners):
                    home = self.plan.home_ranks[index][group]
                    used[PoolId(owner, index)] += pages
                    if owner != home and sequence.is_prefilling:
                        used[PoolId(home, index)] += staged
        for pool in self.cache.pools:
            assert self.num_pages[pool.rank] - self.cache.free_pages(pool) == used[pool], f"{pool} holds other pages"

    def _start_moves(self) -> None:
        """Starts migrations of a random sequence's lanes to random ranks, with the probability `moves_per_step`."""
        candidates = [s for s in self.scheduler.running if s.is_generating and not self.cache.is_moving(s.slot)]
        if not candidates or self.random.random() >= self.moves_per_step:
            return
        sequence = self.random.choice(candidates)
        for stage, owners in enumerate(self.cache.owners(sequence.slot)):
            for group, source in enumerate(owners):
                target = self.random.choice([self.plan.home_ranks[stage][group], *self.plan.worker_ranks])
                if target != source and self.random.random() < 0.5:
                    move = Move(slot=sequence.slot, stage=stage, group=group, source=source, target=target)
                    self.started += self.migrator.start([move])

    def _schedule(self) -> Batch | None:
        self.committed += self.migrator.commit()
        return self.scheduler.schedule()

    def _send(self, batch: Batch) -> None:
        self._check(batch)
        self.batches.append(batch)
        rows = [
            FakeRow(s.slot, s.arrival, row.start, row.count, row.is_decode, row.samples, row.token_ids[-1])
            for row, s in ((row, row.sequence) for row in batch.rows)
        ]
        owners = {sequence.slot: placement.owners for sequence, placement in batch.admitted}
        committed, self.committed = self.committed, []
        pages, transfers = self.cache.take_deltas(), self.migrator.plan({})
        self.pipeline[0].append(Command(rows, owners, pages, batch, committed, transfers))

    def _finish(self, batch: Batch, tokens: list[int]) -> None:
        self.scheduler.on_tokens(batch, tokens)
        ended = {row.sequence.id: row.sequence for row in batch.rows if row.sequence.finish_reason is not None}
        self.finished += [sequence for sequence in ended.values() if not sequence.in_flight]

    def _check(self, batch: Batch) -> None:
        """The rules that every batch keeps."""
        num_stages = len(self.stages)
        in_flight = {row.sequence.id for queue in self.pipeline for command in queue for row in command.batch.rows}
        ids = {row.sequence.id for row in batch.rows}
        assert self.depth or ids.isdisjoint(in_flight), "a sequence is in two places at once"
        for id_ in ids:
            first, *others = sorted((row.start, row.count) for row in batch.rows if row.sequence.id == id_)
            assert [start for start, _ in others] in ([], [sum(first)]), "tokens are computed twice, or left out"
        assert sum(map(len, self.pipeline)) < num_stages + self.depth, "too many steps in flight"
        ended = [row.sequence.id for row in batch.rows if row.sequence.finish_reason is not None]
        assert not ended, "tokens are computed of sequences that have ended"
        assert all(row.start + row.count < row.sequence.prompt_len + row.sequence.max_tokens for row in batch.rows)
        assert batch.num_tokens <= -(-self.max_num_batched_tokens // num_stages), "over the token budget"
        assert sum(row.count for row in batch.rows if row.is_decode) <= self.max_num_seqs, "ranks have no room"
        assert all(row.count > 0 for row in batch.rows)
        kinds = [row.is_decode for row in batch.rows]
        assert kinds == sorted(kinds, reverse=True), "decode rows come first"
        assert self.slots_in_use.issuperset(batch.released), "a slot is released that is not in use"
        assert len(set(batch.released)) == len(batch.released)
        self.slots_in_use.difference_update(batch.released)
        admitted = [sequence for sequence, _ in batch.admitted]
        assert self.slots_in_use.isdisjoint(sequence.slot for sequence in admitted), "a slot is given away twice"
        assert batch.rows or self.migrator.is_busy
        assert {sequence.id for sequence in admitted} <= ids, "admitted but not computed"
        self.slots_in_use.update(sequence.slot for sequence in admitted)
        assert {row.sequence.slot for row in batch.rows} <= self.slots_in_use
        assert len(self.scheduler.running) <= self.max_num_seqs

    def check_idle(self) -> None:
        """Nothing runs, and every page is free."""
        self.cache.check_integrity()
        assert not self.has_work
        for rank, usage in self.cache.usage().items():
            assert (usage.pages_used, usage.num_lanes) == (0, 0), f"rank {rank} still holds pages"
        for pool in self.cache.pools:
            assert self.cache.free_pages(pool) == self.num_pages[pool.rank]


def churn(engine: ToyEngine, sequences: list[Sequence], random: Random, turn: Callable[[], None]) -> set[str]:
    """Adds `sequences` in order, aborts some, and calls `turn` until all is done. The ids of the aborted."""
    coming, aborted = list(sequences), set()
    for _ in range(100_000):
        if not (coming or engine.has_work):
            engine.check_idle()
            return aborted
        while coming and (random.random() < 0.3 or not engine.has_work):
            engine.scheduler.add(coming.pop(0))
        victim = random.choice(sequences)
        if random.random() < 0.02 and engine.scheduler.abort(victim.id) is not None:
            aborted.add(victim.id)
        if engine.has_work:
            turn()
    raise AssertionError("a sequence is never done")


def rows_of(batch: Batch) -> list[tuple[str, int, int]]:
    """(sequence, start, count) of each row, to compare with."""

    def plain(row: Row) -> tuple[str, int, int]:
        return row.sequence.id, row.start, row.count

    return [plain(row) for row in batch.rows]
