"""Metrics of a run."""

from collections.abc import Sequence

import msgspec
import numpy as np

from .client import Timeline


class Metrics(msgspec.Struct, kw_only=True):
    """One run. Times in milliseconds."""

    tokens_per_s: float  # output tokens, from the first arrival to the last token
    ttft_p50: float  # arrival to first token
    ttft_p95: float
    tpot_p50: float  # mean time between tokens of one request, over requests
    tpot_p95: float
    kv_peak: int  # largest number of tokens of running requests at a time, prompt and output
    window_tokens_per_s: float  # output tokens in the scenario's window


def measure(timelines: Sequence[Timeline], window_s: tuple[float, float]) -> Metrics:
    first = min(t.arrival_s for t in timelines)
    last = max(t.token_s[-1] for t in timelines)
    ttft = [1e3 * (t.token_s[0] - t.arrival_s) for t in timelines]
    tpot = [1e3 * (t.token_s[-1] - t.token_s[0]) / (len(t.token_s) - 1) for t in timelines if len(t.token_s) > 1]
    return Metrics(
        tokens_per_s=sum(len(t.token_s) for t in timelines) / (last - first),
        ttft_p50=float(np.percentile(ttft, 50)),
        ttft_p95=float(np.percentile(ttft, 95)),
        tpot_p50=float(np.percentile(tpot, 50)),
        tpot_p95=float(np.percentile(tpot, 95)),
        kv_peak=kv_peak(timelines),
        window_tokens_per_s=tokens_per_s(timelines, *window_s),
    )


def kv_peak(timelines: Sequence[Timeline]) -> int:
    """Largest total of tokens of requests that are between their first and their last token."""
    events: list[tuple[float, int]] = []
    for timeline in timelines:
        events.append((timeline.token_s[0], timeline.num_context))
        events += [(moment, 1) for moment in timeline.token_s]
        events.append((timeline.token_s[-1], -timeline.num_context - len(timeline.token_s)))
    held = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):  # stable: gains of a moment before its losses
        held += change
        peak = max(peak, held)
    return peak


def tokens_per_s(timelines: Sequence[Timeline], begin_s: float, end_s: float) -> float:
    """Output tokens per second from `begin_s` to `end_s`."""
    if end_s <= begin_s:
        return 0.0
    return sum(begin_s <= moment < end_s for t in timelines for moment in t.token_s) / (end_s - begin_s)


def sliding_rate(timelines: Sequence[Timeline], width_s: float, step_s: float = 0.5) -> list[tuple[float, float]]:
    """(end, tokens/s) of windows of `width_s` that advance by `step_s` over the run."""
    last = max(t.token_s[-1] for t in timelines)
    ends = np.arange(width_s, last + step_s, step_s).tolist()
    return [(end, round(tokens_per_s(timelines, end - width_s, end), 1)) for end in ends]
