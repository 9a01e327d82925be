"""Which rank holds which layers, head groups, MLP columns and vocabulary rows, and on which device.

Spans are half-open `[start, stop)`. Nothing here must divide anything: 8 groups over two ranks as 5+3 is fine. A
primary may have no head groups (then it is no home and needs no KV memory), no columns or no rows, but not nothing at
all. Plans are made in `plan_sources.py`.
"""

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise

import msgspec

from hetis.core.spans import Span


class Primary(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor-parallel rank of one stage. It is the home of its head groups: it computes their q, k and v."""

    rank: int
    device: str
    groups: Span
    mlp_columns: Span
    vocab_rows: Span  # of the embedding in the first stage and of the LM head in the last one
    kv_memory: int | None = None  # bytes, if it has head groups; None: decided from the device's free memory

    @property
    def num_groups(self) -> int:
        return self.groups[1] - self.groups[0]

    @property
    def num_mlp_columns(self) -> int:
        return self.mlp_columns[1] - self.mlp_columns[0]

    @property
    def num_vocab_rows(self) -> int:
        return self.vocab_rows[1] - self.vocab_rows[0]


class AttentionWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A rank that holds KV pages of all stages and no weights."""

    rank: int
    device: str
    kv_memory: int | None = None  # bytes; None: decided from the device's free memory


Member = Primary | AttentionWorker


class Stage(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Consecutive layers and the primaries that split each of them."""

    layers: Span
    primaries: tuple[Primary, ...]  # in tensor-parallel order

    @property
    def num_layers(self) -> int:
        return self.layers[1] - self.layers[0]

    @property
    def num_groups(self) -> int:
        """G, the head groups of the model."""
        return len(self.home_ranks)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the primaries, in tensor-parallel order."""
        return tuple(primary.rank for primary in self.primaries)

    @cached_property
    def homes(self) -> tuple[Primary, ...]:
        """The primaries with head groups, in tensor-parallel order. The others have neither pages nor links."""
        return tuple(primary for primary in self.primaries if primary.num_groups)

    @cached_property
    def home_ranks(self) -> tuple[int, ...]:
        """[G] rank of each head group's home."""
        return tuple(home.rank for home in self.homes for _ in range(home.num_groups))


class Plan(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The work of every rank. What follows from the two fields is computed once per object, when first asked for."""

    stages: tuple[Stage, ...]
    workers: tuple[AttentionWorker, ...] = ()

    @property
    def world_size(self) -> int:
        return len(self.members)

    @property
    def num_groups(self) -> int:
        """G, the head groups of the model: every stage has all of them."""
        return self.stages[0].num_groups

    @cached_property
    def primaries(self) -> tuple[Primary, ...]:
        """Stage by stage, in tensor-parallel order."""
        return tuple(primary for stage in self.stages for primary in stage.primaries)

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Primaries and attention workers, in rank order."""
        return tuple(sorted((*self.primaries, *self.workers), key=lambda member: member.rank))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """All ranks, ascending."""
        return tuple(member.rank for member in self.members)

    @cached_property
    def worker_ranks(self) -> tuple[int, ...]:
        """Ranks of the attention workers, in the order of the plan."""
        return tuple(worker.rank for worker in self.workers)

    @cached_property
    def homes(self) -> tuple[tuple[int, Primary], ...]:
        """(stage index, home) of all homes, stage by stage, in tensor-parallel order."""
        return tuple((index, home) for index, stage in enumerate(self.stages) for home in stage.homes)

    @cached_property
    def home_ranks(self) -> tuple[tuple[int, ...], ...]:
        """[stage][G] rank of each head group's home."""
        return tuple(stage.home_ranks for stage in self.stages)

    @cached_property
    def links(self) -> tuple[tuple[Primary, AttentionWorker], ...]:
        """(home, worker) of every link between these two, in the order in which links are opened."""
        return tuple((home, worker) for _, home in self.homes for worker in self.workers)

    @cached_property
    def handovers(self) -> tuple[tuple[int, int], ...]:
        """(sender, receiver) ranks between stages: every rank receives from one rank of the stage before."""
        return tuple(
            (before.ranks[index % len(before.ranks)], receiver)
            for before, after in pairwise(self.stages)
            for index, receiver in enumerate(after.ranks)
        )

    @cached_property
    def _positions(self) -> dict[int, tuple[int, int]]:
        return {rank: (s, t) for s, stage in enumerate(self.stages) for t, rank in enumerate(stage.ranks)}

    def position_of(self, rank: int) -> tuple[int, int]:
        """(stage index, tensor-parallel index) of a primary. KeyError for another rank."""
        return self._positions[rank]

    def primary(self, rank: int) -> Primary:
        """The primary of this rank. KeyError for another rank."""
        stage, index = self.position_of(rank)
        return self.stages[stage].primaries[index]

    def stage_of(self, primary: Primary) -> Stage:
        return self.stages[self.position_of(primary.rank)[0]]

    def is_worker(self, rank: int) -> bool:
        return rank in self.worker_ranks

    def role_of(self, rank: int) -> str:
        """The word for messages to users."""
        return "attention worker" if self.is_worker(rank) else "primary"

    def device_of(self, rank: int) -> str:
        return next(member.device for member in self.members if member.rank == rank)

    def is_first(self, stage_index: int) -> bool:
        return stage_index == 0

    def is_last(self, stage_index: int) -> bool:
        return stage_index == len(self.stages) - 1

    def with_devices(self, devices: Mapping[int, str]) -> "Plan":
        """The same work on other devices, given by rank."""
        replace = msgspec.structs.replace
        stages = tuple(
            replace(stage, primaries=tuple(replace(each, device=devices[each.rank]) for each in stage.primaries))
            for stage in self.stages
        )
        workers = tuple(replace(worker, device=devices[worker.rank]) for worker in self.workers)
        return Plan(stages=stages, workers=workers)
