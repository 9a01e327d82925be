"""What the ranks measure while they serve: the cost model follows it, and the fleet's table shows it."""

from hetis.core.messages import StepTimes
from hetis.core.plan import Plan
from hetis.core.step_times import Activity, StageTimes
from hetis.cost.cost_model import CostModel

HAUL_SHARE = 0.03  # of a layer's time, that pages of lanes on the move may take on a link; 0.05 shows at times
LAYER_WEIGHT = 0.1  # of one step in the moving average of a layer's time


class Observer:
    """Feeds a cost model. Times of a step come from all ranks, in any order."""

    def __init__(self, cost: CostModel, plan: Plan) -> None:
        self.cost, self._plan = cost, plan
        self._workers = plan.worker_ranks
        self._layer_us = 0.0  # in a step without prompts, over all primaries
        # by (rank, stage), in its last step with decodes: query heads, and us of attention a layer
        self._worked: dict[tuple[int, int], tuple[int, float]] = {}
        self._trips: dict[tuple[int, int], dict[int, float]] = {}  # by (worker, stage): home -> us of its round trip
        self._predicted: dict[int, float] = {}  # rank -> sum of us a layer, over steps with heads
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
        self._worked[rank, stage.stage] = stage.heads, measured_us
        if stage.heads:
            kv_bytes = stage.kv_tokens * self.cost.kv_bytes_per_token
            predicted_us = self.cost.attention_us(rank, stage.heads, kv_bytes)
            self._predicted[rank] = self._predicted.get(rank, 0.0) + predicted_us
            self._measured[rank] = self._measured.get(rank, 0.0) + measured_us
            self._counted[rank] = self._counted.get(rank, 0) + 1
            self.cost.observe(rank, stage.heads, kv_bytes, measured_us)
        elif not any(heads for (other, _), (heads, _) in self._worked.items() if other == rank):
            self.cost.relax([rank])

    def _follow_layers(self, rank: int, stage: StageTimes, num_layers: int) -> None:
        dense_us, other_us = stage.activity_us[Activity.DENSE], stage.activity_us[Activity.OTHER]
        self.cost.observe_dense(rank, dense_us / num_layers, other_us / num_layers)
        layer_us = (sum(stage.activity_us) - other_us - stage.activity_us[Activity.STAGE]) / num_layers
        self._layer_us += LAYER_WEIGHT * (layer_us - self._layer_us)

    def _follow_links(self, home: int, stage: StageTimes) -> None:
        """A round trip less the worker's attention: packing and appending at both ends are part of the way.

        A worker serves the homes of a stage in turn, so the longest of their round trips has the attention of all.
        """
        for worker in self._workers:
            trips = self._trips.setdefault((worker, stage.stage), {})
            trips.pop(home, None)
            if worker in stage.round_trip_us:
                trips[home] = stage.round_trip_us[worker]
                if trips[home] == max(trips.values()):
                    heads, attention_us = self._worked.get((worker, stage.stage), (0, 0.0))
                    self.cost.observe_link(worker, heads, max(0.0, trips[home] - attention_us))

    @property
    def haul_bytes(self) -> dict[int, float]:
        """By worker: bytes of lanes on the move that a message to or from it may carry without being noticed."""
        paces = {worker: self.cost.prompt_us_per_byte(worker) for worker in self._workers}
        return {worker: HAUL_SHARE * self._layer_us / pace for worker, pace in paces.items() if pace}

    def mean_us(self, rank: int) -> tuple[float, float]:
        """(predicted, measured) decode attention of a layer, on average over the steps in which a rank had heads."""
        count = max(1, self._counted.get(rank, 0))
        return self._predicted.get(rank, 0.0) / count, self._measured.get(rank, 0.0) / count
