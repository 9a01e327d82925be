"""What the ranks measure while they serve: the cost model follows it, and the fleet's table shows it."""

from math import inf

from hetis.core.messages import StepTimes
from hetis.core.plan import Plan
from hetis.core.times import Span, StageTimes
from hetis.cost.cost_model import CostModel

HAUL_SHARE = 0.05  # of a layer's time, that pages of lanes on the move may take on a link
LAYER_WEIGHT = 0.1  # of one step in the moving average of a layer's time


class Observer:
    """Feeds a cost model. Times of a step come from all ranks, in any order."""

    def __init__(self, cost: CostModel, plan: Plan) -> None:
        self.cost, self._plan = cost, plan
        self._workers = {worker.rank for worker in plan.workers}
        self._layer_us = 0.0  # in a step without prompts, over all primaries
        self._worked: dict[int, tuple[int, float]] = {}  # worker -> (query heads, attention us a layer), its last step
        self._predicted: dict[int, float] = {}  # rank -> sum of us a layer, over steps with heads
        self._measured: dict[int, float] = {}
        self._counted: dict[int, int] = {}

    def on_times(self, times: StepTimes) -> None:
        for stage in times.stages:
            num_layers = self._plan.stages[stage.stage].num_layers
            attention_us = stage.span_us[Span.ATTENTION] / num_layers
            self._follow_attention(times.rank, stage, attention_us)
            if times.rank in self._workers:
                self._worked[times.rank] = stage.heads, attention_us
            elif not stage.num_prompt_tokens and stage.span_us[Span.DENSE]:
                beside_us = stage.span_us[Span.DENSE] + stage.span_us[Span.OTHER]
                self.cost.observe_dense(times.rank, beside_us / num_layers)
                layer_us = (sum(stage.span_us) - stage.span_us[Span.OTHER]) / num_layers
                self._layer_us += LAYER_WEIGHT * (layer_us - self._layer_us)
                self._follow_links(stage)

    def _follow_attention(self, rank: int, stage: StageTimes, measured_us: float) -> None:
        if not stage.heads:
            self.cost.relax([rank])
            return
        kv_bytes = stage.kv_tokens * self.cost.kv_bytes_per_token
        self._predicted[rank] = self._predicted.get(rank, 0.0) + self.cost.attention_us(rank, stage.heads, kv_bytes)
        self._measured[rank] = self._measured.get(rank, 0.0) + measured_us
        self._counted[rank] = self._counted.get(rank, 0) + 1
        self.cost.observe(rank, stage.heads, kv_bytes, measured_us)

    def _follow_links(self, stage: StageTimes) -> None:
        """A round trip less the worker's attention: packing and appending at both ends are part of the way."""
        for worker, round_trip_us in stage.round_trip_us.items():
            heads, attention_us = self._worked.get(worker, (0, 0.0))
            self.cost.observe_link(worker, heads, max(0.0, round_trip_us - attention_us))

    @property
    def haul_bytes(self) -> float:
        """Bytes of lanes on the move that a message may carry without being noticed, over the slowest link."""
        slowest = max((self.cost.prompt_us_per_byte(worker) for worker in self._workers), default=0.0)
        return HAUL_SHARE * self._layer_us / slowest if slowest else inf

    def mean_us(self, rank: int) -> tuple[float, float]:
        """(predicted, measured) decode attention of a layer, on average over the steps in which a rank had heads."""
        count = max(1, self._counted.get(rank, 0))
        return self._predicted.get(rank, 0.0) / count, self._measured.get(rank, 0.0) / count
