"""The load that the devices of a fleet have already, as the placement problem (`problem.py`) needs it.

All times of a pipeline stage are microseconds for one of its layers. A worker serves all stages at once, so what it
does for another stage counts here as well, in proportion to the layers: while this stage computes one layer, the other
one computes (its layers / this stage's layers) of them.
"""

from collections.abc import Iterable, Sequence
from copy import copy

import msgspec

from hetis.core.attention_rates import AttentionRates
from hetis.core.placement import FleetView, PoolId
from hetis.core.plan import Plan
from hetis.cost.cost_model import CostModel

WEAK = 0.06  # workers that together can make attention faster by no more than this fraction are left out
ALIKE = 1.5  # speeds that differ by no more than this factor


class StageDevices(msgspec.Struct, frozen=True, kw_only=True):
    """Devices that may hold the lanes of one stage: homes first, then workers."""

    stage: int
    pools: tuple[PoolId, ...]
    num_homes: int
    most_lanes: tuple[int, ...]  # of one sequence
    num_lanes: int

    def owners(self, counts: Sequence[int]) -> tuple[int, ...]:
        """[G] ranks for lanes per device: the first groups of each home stay, the others go to the workers in turn."""
        on_workers = zip(self.pools[self.num_homes :], counts[self.num_homes :], strict=True)
        away = iter([pool.rank for pool, count in on_workers for _ in range(count)])
        owners: list[int] = []
        for pool, count, groups in zip(self.pools[: self.num_homes], counts, self.most_lanes, strict=False):
            owners += [pool.rank] * count
            owners += [next(away) for _ in range(groups - count)]
        return tuple(owners)


def stage_devices(plan: Plan) -> list[StageDevices]:
    return [
        StageDevices(
            stage=index,
            pools=tuple(PoolId(rank, index) for rank in (*(home.rank for home in stage.homes), *plan.worker_ranks)),
            num_homes=len(stage.homes),
            most_lanes=(*(home.num_groups for home in stage.homes), *[stage.num_groups] * len(plan.workers)),
            num_lanes=stage.num_groups,
        )
        for index, stage in enumerate(plan.stages)
    ]


class FleetLoad:
    """Query heads and KV bytes of every pool, and the times that follow from them."""

    def __init__(self, plan: Plan, cost: CostModel) -> None:
        self._cost = cost
        # by stage: the other ones, with the layers that they compute while it computes one
        self._other_stages = [
            [(i, other.num_layers / stage.num_layers) for i, other in enumerate(plan.stages) if i != index]
            for index, stage in enumerate(plan.stages)
        ]
        self._primaries = [stage.ranks for stage in plan.stages]
        self._is_worker = {rank: plan.is_worker(rank) for rank in plan.ranks}
        self._rates = {rank: cost.rates(rank, is_worker=works) for rank, works in self._is_worker.items()}
        self._heads: dict[PoolId, float] = {}
        self._kv_bytes: dict[PoolId, float] = {}

    @classmethod
    def of_view(cls, view: FleetView, cost: CostModel, tokens_ahead: int = 0) -> "FleetLoad":
        """The load when every lane has `tokens_ahead` tokens more."""
        load = cls(view.plan, cost)
        for pool, lanes in view.held_lanes.items():
            if lanes:
                load.add(pool, lanes, cost.kv_bytes(view.held_tokens[pool] / lanes + tokens_ahead))
        return load

    def add(self, pool: PoolId, num_lanes: int, lane_kv_bytes: float) -> None:
        """Adds lanes to a pool; a negative number takes them away."""
        self._heads[pool] = self._heads.get(pool, 0) + num_lanes * self._cost.queries_per_group
        self._kv_bytes[pool] = self._kv_bytes.get(pool, 0.0) + num_lanes * lane_kv_bytes

    def clear(self, stage: "StageDevices") -> None:
        """Takes all lanes of a stage away."""
        for pool in stage.pools:
            self._heads.pop(pool, None)
            self._kv_bytes.pop(pool, None)

    def copy(self) -> "FleetLoad":
        other = copy(self)
        other._heads, other._kv_bytes = dict(self._heads), dict(self._kv_bytes)
        return other

    def dense_us(self, stage: "StageDevices") -> float:
        """Non-attention time of a layer in a decode step, of all primaries: those without head groups share it."""
        return self._cost.dense_us(self._primaries[stage.stage])

    def rates(self, rank: int) -> AttentionRates:
        return self._rates[rank]

    def is_worker(self, rank: int) -> bool:
        return self._is_worker[rank]

    def start_us(self, pool: PoolId) -> float:
        """A device's time once it is used in this stage, before the first new lane; its floor does not count here."""
        return self._rates[pool.rank].line_us(*self._work(pool))

    def time_us(self, pool: PoolId) -> float:
        """0 for a device without lanes of the stage."""
        return self._rates[pool.rank].time_us(*self._work(pool)) if self._heads.get(pool, 0) else 0.0

    def _work(self, pool: PoolId) -> tuple[float, float]:
        """(query heads, KV bytes) for each layer of the pool's stage, with a worker's share of other stages' layers."""
        heads, kv_bytes = self._heads.get(pool, 0), self._kv_bytes.get(pool, 0.0)
        for stage, layers in self._other_stages[pool.stage] if self._is_worker[pool.rank] else ():
            other = PoolId(pool.rank, stage)
            heads += self._heads.get(other, 0) * layers
            kv_bytes += self._kv_bytes.get(other, 0.0) * layers
        return heads, kv_bytes

    def makespan_us(self, pools: Iterable[PoolId]) -> float:
        return max(map(self.time_us, pools), default=0.0)

    def lanes_us(self, rank: int, kv_bytes: Iterable[float]) -> list[float]:
        """Time that a lane adds to a device, for each number of KV bytes."""
        rates = self._rates[rank]
        heads_us, us_per_byte = rates.us_per_head * self._cost.queries_per_group, rates.us_per_byte
        return [max(heads_us + us_per_byte * lane_bytes, 1e-9) for lane_bytes in kv_bytes]

    def lane_us(self, rank: int, kv_bytes: float) -> float:
        """Time that one lane of so many KV bytes adds to a device."""
        return self.lanes_us(rank, (kv_bytes,))[0]


def is_worth(num_more: int, num_before: int, cycle_us: float, cycle_before_us: float) -> bool:
    """Whether sequences advance at a higher rate with `num_more` beside `num_before`, though a step takes longer."""
    return num_before * (cycle_us - cycle_before_us) <= num_more * cycle_before_us


def weak_workers(stage: StageDevices, lane_us: list[list[float]]) -> set[int]:
    """Workers that, with all that are alike or slower, could make attention faster by the fraction `WEAK` at most.

    The little that they gain is lost whenever the load is a little out of balance. The criterion is the paper's for
    excluding devices from the primaries, in the same closed form: their share of the sum of speeds. `lane_us`: [N][J].
    """
    speeds = [1 / sum(costs) for costs in lane_us]
    most = WEAK / (1 + WEAK) * sum(speeds)
    workers = range(stage.num_homes, len(speeds))
    return {i for i in workers if sum(speeds[k] for k in workers if speeds[k] <= ALIKE * speeds[i]) <= most}
