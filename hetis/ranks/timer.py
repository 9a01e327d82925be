"""One stage's time on one rank: its stopwatch, the round trips of its messages, and the report they make."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from hetis.core.messages import StepTimes
from hetis.core.messages.step_command import Step
from hetis.core.step_times import Activity, StageTimes
from hetis.ranks.step_input import DecodeLanes
from hetis.ranks.stopwatch import Trace, make_stopwatch, pack_trace, totals_us

REAL_WAIT = 5e-6  # seconds: a shorter wait finds a reply that had come before


class StageTimer:
    def __init__(self, stage: int, num_queries: int, device: torch.device, traced: bool) -> None:
        """`num_queries`: M. `traced`: reports carry every lap."""
        self._stage, self._num_queries, self._traced = stage, num_queries, traced
        self._stopwatch = make_stopwatch(device)
        self.lap = self._stopwatch.lap
        self._sent: dict[int, int] = {}  # peer -> the lap at whose end a message went
        self._replies: list[tuple[int, int, int]] = []  # peer, that lap, and the lap at whose end the reply was there

    def begin(self) -> None:
        self._replies.clear()
        self._stopwatch.begin()

    def on_sent(self, peer: int) -> None:
        """A message has gone: a lap of `SEND`."""
        self._sent[peer] = self.lap(Activity.SEND)

    def on_received(self, peer: int) -> None:
        """Its reply is here: a lap of `WAIT`."""
        self._replies.append((peer, self._sent[peer], self.lap(Activity.WAIT)))

    def report(self, lanes: Sequence[DecodeLanes], num_page_layers: int) -> StageTimes:
        """`lanes`: those whose attention was computed here."""
        trace = self._stopwatch.read()
        return StageTimes(
            stage=self._stage,
            heads=self._num_queries * sum(map(len, lanes)),
            kv_tokens=sum(each.kv_tokens for each in lanes),
            activity_us=totals_us(trace),
            round_trip_us=self._round_trips_us(trace),
            num_page_layers=num_page_layers,
            trace=pack_trace(trace) if self._traced else b"",
        )

    def _round_trips_us(self, trace: Trace) -> dict[int, float]:
        """Means. A reply counts if it was waited for: else it came at an unknown time before."""
        found: defaultdict[int, list[float]] = defaultdict(list)
        for peer, sent, received in self._replies:
            _, waiting_since, now = trace[received]
            if now - waiting_since > REAL_WAIT:
                found[peer].append(now - trace[sent][2])
        return {peer: 1e6 * sum(seconds) / len(seconds) for peer, seconds in found.items()}


def step_times(rank: int, step: Step, stages: list[StageTimes]) -> StepTimes:
    return StepTimes(
        rank=rank,
        step=step.number,
        num_decodes=step.num_decode_rows,
        num_prompt_tokens=step.num_tokens - step.num_decode_tokens,
        stages=stages,
    )


def attention_seconds(times: StageTimes) -> float:
    """All that attention took, appending included."""
    return 1e-6 * sum(
        times.activity_us[activity] for activity in (Activity.APPEND, Activity.ATTENTION, Activity.PROMPT)
    )
