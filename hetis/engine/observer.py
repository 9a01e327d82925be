"""Times that ranks measure while they serve: the cost model follows them, and the fleet's table shows them."""

from hetis.core.messages import StepTimes
from hetis.core.plan import Plan
from hetis.core.step_times import Activity, StageTimes
from hetis.cost.cost_model import CostModel

PAGE_SHARE = 0.03  # of a layer's time, for page transfers on a link; with 0.05 steps became longer in some runs
LAYER_WEIGHT = 0.1  # of one step in the moving average of a layer's time


class Observer:
    """Feeds a cost model with measured times, which come from all ranks in any order."""

    def __init__(self, cost: CostModel, plan: Plan) -> None:
        self.cost, self._plan = cost, plan
        self._workers = plan.worker_ranks
        self._layer_us = 0.0  # moving average over all primaries, of steps without prompts
        # (rank, stage) -> query heads and attention us per layer, of its last step with decodes
        self._last_attention: dict[tuple[int, int], tuple[int, float]] = {}
        self._round_trips: dict[tuple[int, int], dict[int, float]] = {}  # (worker, stage) -> us by home
        # rank -> sums of us per layer, and number of steps, over steps in which it had heads
        self._predicted: dict[int, float] = {}
        self._measured: dict[int, float] = {}
        self._counted: dict[int, int] = {}

    def on_times(self, times: StepTimes) -> None:
        if not times.num_decodes:
            return
        for stage in times.stages:
            num_layers = self._plan.stages[stage.stage].num_layers
            self._follow_attention(times.rank, stage, stage.activity_us[Activity.ATTENTION] / num_layers)
            if times.rank not in self._workers and not times.num_prompt_tokens:
                self._follow_layers(times.rank, stage, num_layers)
                self._follow_links(times.rank, stage)

    def _follow_attention(self, rank: int, stage: StageTimes, measured_us: float) -> None:
        self._last_attention[rank, stage.stage] = stage.heads, measured_us
        if stage.heads:
            kv_bytes = stage.kv_tokens * self.cost.kv_bytes_per_token
            predicted_us = self.cost.attention_us(rank, stage.heads, kv_bytes)
            self._predicted[rank] = self._predicted.get(rank, 0.0) + predicted_us
            self._measured[rank] = self._measured.get(rank, 0.0) + measured_us
            self._counted[rank] = self._counted.get(rank, 0) + 1
            self.cost.observe(rank, stage.heads, kv_bytes, measured_us)
        elif not any(heads for (other, _), (heads, _) in self._last_attention.items() if other == rank):
            self.cost.relax([rank])

    def _follow_layers(self, rank: int, stage: StageTimes, num_layers: int) -> None:
        dense_us, other_us = stage.activity_us[Activity.DENSE], stage.activity_us[Activity.OTHER]
        self.cost.observe_dense(rank, dense_us / num_layers, other_us / num_layers)
        layer_us = (sum(stage.activity_us) - other_us - stage.activity_us[Activity.STAGE]) / num_layers
        self._layer_us += LAYER_WEIGHT * (layer_us - self._layer_us)

    def _follow_links(self, home: int, stage: StageTimes) -> None:
        """Link time is a round trip less the worker's attention; packing and appending at both ends belong to the link.

        A worker serves the homes of a stage in turn, so the longest of their round trips contains the attention of all.
        """
        for worker in self._workers:
            trips = self._round_trips.setdefault((worker, stage.stage), {})
            trips.pop(home, None)
            if worker in stage.round_trip_us:
                trips[home] = stage.round_trip_us[worker]
                if trips[home] == max(trips.values()):
                    heads, attention_us = self._last_attention.get((worker, stage.stage), (0, 0.0))
                    self.cost.observe_link(worker, heads, max(0.0, trips[home] - attention_us))

    @property
    def page_bytes(self) -> dict[int, float]:
        """Bytes of pages, by worker, that each of its links may carry each way in `PAGE_SHARE` of a layer's time."""
        us_per_byte = {worker: self.cost.prompt_us_per_byte(worker) for worker in self._workers}
        return {worker: PAGE_SHARE * self._layer_us / us for worker, us in us_per_byte.items() if us}

    def mean_us(self, rank: int) -> tuple[float, float]:
        """(predicted, measured) us of a layer's decode attention, averaged over the steps in which a rank had heads."""
        count = max(1, self._counted.get(rank, 0))
        return self._predicted.get(rank, 0.0) / count, self._measured.get(rank, 0.0) / count
