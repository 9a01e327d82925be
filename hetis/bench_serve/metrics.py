"""Figures of a run under the names and by the definitions of vLLM's `bench serve`. Functions of answers; no clock.

Times in keys ending in _ms are milliseconds, all others seconds. Of each request that completed:

    TTFT = first chunk - sending             E2EL = last chunk - sending
    TPOT = (E2EL - TTFT) / (tokens - 1)      ITL  = between consecutive chunks, pooled over requests
    client_queue_time = sending - due        e2el_including_client_queue = last chunk - due

TPOT exists for outputs of more than one token. Throughput is per second of the whole run; the peak of output tokens
counts chunks in whole seconds after the first request.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hetis.bench_serve.answer import Answer

Result = dict[str, Any]


def tpot(answer: Answer) -> float:
    """Seconds per output token after the first; 0 for outputs of one token."""
    return (answer.latency - answer.ttft) / (answer.output_tokens - 1) if answer.output_tokens > 1 else 0.0


def values_of(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Seconds of each metric in `TITLES`, for answers that completed."""
    return {
        "ttft": [answer.ttft for answer in answers],
        "tpot": [tpot(answer) for answer in answers if answer.output_tokens > 1],
        "itl": [gap for answer in answers for gap in answer.intervals],
        "e2el": [answer.latency for answer in answers],
        "client_queue_time": [answer.queue_time for answer in answers],
        "e2el_including_client_queue": [answer.queue_time + answer.latency for answer in answers],
    }


def figures(
    answers: Sequence[Answer],
    duration: float,
    *,
    percentiles: Sequence[float],
    metrics: Sequence[str],
    goals_ms: Mapping[str, float],
) -> Result:
    """All figures of a run that took `duration` seconds. `goals_ms`: limits by metric that make a request good."""
    completed = [answer for answer in answers if answer.failure is None]
    num_input = sum(answer.prompt_len for answer in completed)
    num_output = sum(answer.output_tokens for answer in completed)
    num_good = sum(is_good(answer, goals_ms) for answer in completed)
    result: Result = {
        "duration": duration,
        "completed": len(completed),
        "failed": len(answers) - len(completed),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(completed) / duration,
        "request_goodput": num_good / duration if goals_ms else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        **details(answers),
        "max_output_tokens_per_s": peak_chunks(completed),
        "max_concurrent_requests": peak_concurrency(completed),
    }
    values = values_of(completed)
    for name in metrics:
        result |= summary(name, values[name], percentiles)
    return result


def details(answers: Sequence[Answer]) -> Result:
    """A value of each request, failed ones included."""
    return {
        "input_lens": [answer.prompt_len for answer in answers],
        "output_lens": [answer.output_tokens for answer in answers],
        "ttfts": [answer.ttft for answer in answers],
        "itls": [answer.intervals for answer in answers],
        "latencies": [answer.latency for answer in answers],
        "start_times": [answer.start for answer in answers],
        "queue_times": [answer.queue_time for answer in answers],
        "generated_texts": ["".join(answer.texts) for answer in answers],
        "errors": ["" if answer.failure is None else str(answer.failure) for answer in answers],
    }


DETAILS = tuple(details(()))


def summary(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> Result:
    """Mean, median, standard deviation (of the population) and percentiles in milliseconds; 0 for no values."""
    milliseconds = 1000 * np.asarray(seconds if len(seconds) else (0.0,))
    found = {"mean": np.mean(milliseconds), "median": np.median(milliseconds), "std": np.std(milliseconds)}
    found |= {f"p{q:g}": np.percentile(milliseconds, q) for q in percentiles}
    return {f"{key}_{name}_ms": float(value) for key, value in found.items()}


def is_good(answer: Answer, goals_ms: Mapping[str, float]) -> bool:
    """Whether a completed request meets all limits. TPOT of an output of one token is 0."""
    found = {"ttft": answer.ttft, "tpot": tpot(answer), "e2el": answer.latency}
    return all(1000 * found[name] <= limit for name, limit in goals_ms.items())


def peak_chunks(completed: Sequence[Answer]) -> float:
    """Most chunks in a second, of those that begin with the first request's start."""
    if not completed:
        return 0.0
    begin = min(answer.start for answer in completed)
    stamps = [answer.first + passed for answer in completed for passed in np.cumsum([0.0, *answer.intervals])]
    return float(np.bincount([math.floor(stamp - begin) for stamp in stamps]).max())


def peak_concurrency(completed: Sequence[Answer]) -> int:
    """Most requests between sending and last chunk at once; one that ends makes room for one that starts then."""
    events = [(answer.start, 1) for answer in completed] + [(answer.start + answer.latency, -1) for answer in completed]
    most = now = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


def failures(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """By kind: {"count", "first": message of the first one}, most frequent kind first."""
    found: dict[str, dict[str, Any]] = {}
    for answer in answers:
        if (failure := answer.failure) is not None:
            found.setdefault(failure.kind, {"count": 0, "first": failure.message})["count"] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]["count"]))


def token_source(answers: Sequence[Answer]) -> str:
    """Where numbers of output tokens come from: "usage", "chunks" (servers without usage), or "usage and chunks"."""
    completed = [answer for answer in answers if answer.failure is None]
    sources = {"usage" if answer.num_tokens else "chunks" for answer in completed}
    return " and ".join(sorted(sources, reverse=True))
