"""One stage's time on one rank: its stopwatch, the round trips of its messages, and the report they make."""

from collections.abc import Sequence
from time import perf_counter

import torch

from hetis.core.times import Span, StageTimes
from hetis.workers.step_input import DecodeLanes
from hetis.workers.stopwatch import make_stopwatch, pack_trace, totals_us

REAL_WAIT = 5e-6  # seconds: whoever waits less finds a reply that had come before


class StageTimer:
    def __init__(self, stage: int, num_queries: int, device: torch.device, traced: bool) -> None:
        """`num_queries`: M. `traced`: reports carry every lap."""
        self._stage, self._num_queries, self._traced = stage, num_queries, traced
        self._stopwatch = make_stopwatch(device)
        self.lap = self._stopwatch.lap
        self._sent: dict[int, float] = {}
        self._round_trips: dict[int, list[float]] = {}

    def begin(self) -> None:
        self._round_trips.clear()
        self._stopwatch.begin()

    def on_sent(self, peer: int) -> None:
        self._sent[peer] = perf_counter()

    def on_received(self, peer: int, waiting_since: float) -> None:
        """A reply counts if it was waited for: else it came some time before, nobody knows when."""
        now = perf_counter()
        if now - waiting_since > REAL_WAIT:
            self._round_trips.setdefault(peer, []).append(now - self._sent[peer])

    def report(self, lanes: Sequence[DecodeLanes], num_prompt_tokens: int, num_page_layers: int) -> StageTimes:
        """`lanes`: those whose attention was computed here."""
        trace = self._stopwatch.read()
        return StageTimes(
            stage=self._stage,
            heads=self._num_queries * sum(map(len, lanes)),
            kv_tokens=sum(each.kv_tokens for each in lanes),
            num_prompt_tokens=num_prompt_tokens,
            span_us=totals_us(trace),
            round_trip_us={peer: 1e6 * sum(times) / len(times) for peer, times in self._round_trips.items()},
            num_page_layers=num_page_layers,
            trace=pack_trace(trace) if self._traced else b"",
        )


def attention_seconds(times: StageTimes) -> float:
    """All that attention took, appending included."""
    return 1e-6 * sum(times.span_us[span] for span in (Span.APPEND, Span.ATTENTION, Span.PROMPT))
