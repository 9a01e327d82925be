"""Prometheus metrics of requests, in vLLM's names, units and buckets under a prefix, and `/metrics`.

An interval is between two stamps of one clock: of this process for what a client sees, of the driver for the queue and
the prefill. What the fleet counts is in `fleet_metrics`, what HTTP does in `http_metrics`.
"""

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.responses import PlainTextResponse

from hetis.core.outputs import MODEL_FAILED
from hetis.server.fleet_metrics import FleetCollector
from hetis.server.metric_factory import MetricFactory
from hetis.server.sampler import FleetSampler

if TYPE_CHECKING:
    from hetis.frontend import requests

SNAPSHOT_SECONDS = 0.5  # scrapes within this time share one snapshot of the fleet
MAX_RECENT = 1024  # requests whose latencies the feed shows
REASONS = ("stop", "length", "abort", "error")
TOKEN_BUCKETS = tuple(mantissa * 10**exponent for exponent in range(6) for mantissa in (1, 2, 5))
N_BUCKETS = (1, 2, 5, 10, 20)
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Metrics:
    """What one server counts. `begin`, meters and the numbers in the open belong to the event loop."""

    def __init__(self, sampler: FleetSampler, model_name: str, prefix: str = "hetis:") -> None:
        """Raises ValueError for a prefix that cannot begin a name: "vllm" and "vllm:" make all names those of vLLM."""
        self._sampler, self.registry = sampler, CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.factory = make = MetricFactory(prefix, {"model_name": model_name, "engine": "0"}, self.registry)
        self.prompt_tokens = self.output_tokens = 0  # of all requests with a first token
        self.num_finished = self.num_failed = 0  # requests; those aborted are neither
        self.recent_ttft: deque[tuple[float, float]] = deque(maxlen=MAX_RECENT)  # (when, seconds)
        self.recent_tpot: deque[tuple[float, float]] = deque(maxlen=MAX_RECENT)
        self.success = make.counters("request_success", "Sequences by why they finished.", "finished_reason", REASONS)
        self.late_errors = make.counter(
            "stream_errors", "Requests that failed after their first token: where streamed, with status 200."
        )
        self.not_finite = make.counter("nan_logits", "Sequences ended since the model's logits were not finite.")
        self.token_times = TokenTimes()
        self.first_token = make.histogram(
            "time_to_first_token_seconds", "To a request's first token.", FIRST_TOKEN_BUCKETS
        )
        self.of_request = _RequestHistograms(make)
        self.registry.register(_TokenCollector(self))
        self.registry.register(FleetCollector(sampler, make))

    def begin(self, request: "requests.Request", endpoint: str) -> "RequestMeter":
        """Call it before the request is streamed; `finish` the meter in any case."""
        return RequestMeter(self, request, endpoint)

    async def render(self) -> bytes:
        """The text for a scraper. A silent driver delays it by half a second at most."""
        await self._sampler.refresh(SNAPSHOT_SECONDS)
        return await asyncio.to_thread(generate_latest, self.registry)


class _RequestHistograms:
    """What is known of a request when it is finished."""

    def __init__(self, make: MetricFactory) -> None:
        tokens = partial(make.histogram, buckets=TOKEN_BUCKETS)
        self.prompt_tokens = tokens("request_prompt_tokens", "Tokens of a prompt.")
        self.output_tokens = tokens("request_generation_tokens", "Tokens of a sequence's output.")
        self.longest_output = tokens(
            "request_max_num_generation_tokens", "Tokens of the longest of a request's n outputs."
        )
        self.max_tokens = tokens("request_params_max_tokens", "The parameter max_tokens.")
        self.n = make.histogram("request_params_n", "The parameter n.", N_BUCKETS)
        seconds = partial(make.histogram, buckets=REQUEST_BUCKETS)
        self.total = seconds("e2e_request_latency_seconds", "From begin to end.")
        self.queue = seconds("request_queue_time_seconds", "In the queue.")
        self.prefill = seconds("request_prefill_time_seconds", "From the queue to the first token.")
        self.decode = seconds("request_decode_time_seconds", "From the first to the last token.")
        self.inference = seconds("request_inference_time_seconds", "From the queue to the last token.")
        self.per_token = make.histogram(
            "request_time_per_output_token_seconds", "Mean after the first token of a request.", TOKEN_SECONDS_BUCKETS
        )


class RequestMeter:
    """The stamps and counts of one request. Stamps are seconds of `time.monotonic`; None: not yet."""

    def __init__(self, metrics: Metrics, request: "requests.Request", endpoint: str) -> None:
        self._metrics, self._request, self.endpoint = metrics, request, endpoint
        self._observe = metrics.token_times.observe
        self._last: list[float | None] = [None] * request.num_completions  # stamps of their last tokens
        self._counts = [0] * request.num_completions  # tokens
        self._reasons: list[str | None] = [None] * request.num_completions
        self.begin = monotonic()
        self.first_token: float | None = None
        self.end: float | None = None
        self.reason: str | None = None  # as given to `finish`

    @property
    def prompt_tokens(self) -> int:
        return len(self._request.prompt_token_ids)

    @property
    def output_tokens(self) -> int:
        return sum(self._counts)

    @property
    def last_token(self) -> float | None:
        return max((stamp for stamp in self._last if stamp is not None), default=None)

    @property
    def queued_s(self) -> float | None:
        """Seconds in the driver's queue."""
        return self._request.queued_s

    @property
    def prefill_s(self) -> float | None:
        """Seconds from the queue to the first token, at the driver."""
        return self._request.prefill_s

    def on_piece(self, piece: "requests.Piece") -> None:
        """Counts a piece when it comes from the engine."""
        index, count = piece.index, len(piece.token_ids)
        if count:
            now, last = monotonic(), self._last[index]
            if last is not None:
                self._observe(now - last)
            elif self.first_token is None:
                self._on_first_token(now)
            self._last[index] = now
            self._counts[index] += count
            self._metrics.output_tokens += count
        if piece.finish_reason is not None:
            self._reasons[index] = piece.finish_reason
            if piece.error == MODEL_FAILED:
                self._metrics.not_finite.inc()

    def _on_first_token(self, now: float) -> None:
        metrics = self._metrics
        self.first_token = now
        metrics.first_token.observe(now - self.begin)
        metrics.recent_ttft.append((now, now - self.begin))
        metrics.prompt_tokens += self.prompt_tokens

    def finish(self, reason: str) -> None:
        """Ends the request for `reason`, which also ends its unfinished completions. Only the first call counts."""
        if self.end is not None:
            return
        self.end, self.reason = monotonic(), reason
        metrics = self._metrics
        metrics.num_finished += reason in ("stop", "length")
        metrics.num_failed += reason == "error"
        if reason == "error" and self.first_token is not None:
            metrics.late_errors.inc()
        for finished in self._reasons:
            metrics.success[finished or reason].inc()
        self._observe_request(metrics.of_request)

    def _observe_request(self, histograms: _RequestHistograms) -> None:
        assert self.end is not None, "the request is finished"
        params = self._request.params
        histograms.total.observe(self.end - self.begin)
        histograms.prompt_tokens.observe(self.prompt_tokens)
        for count in self._counts:
            histograms.output_tokens.observe(count)
        histograms.longest_output.observe(max(self._counts))
        histograms.n.observe(params.n)
        if params.max_tokens is not None:
            histograms.max_tokens.observe(params.max_tokens)
        if self.queued_s is not None:
            histograms.queue.observe(self.queued_s)
        if self.first_token is not None and self.last_token is not None:
            decode = self.last_token - self.first_token
            histograms.decode.observe(decode)
            if self.prefill_s is not None:
                histograms.prefill.observe(self.prefill_s)
                histograms.inference.observe(self.prefill_s + decode)
            self._observe_mean(decode, histograms.per_token)

    def _observe_mean(self, decode: float, histogram: Histogram) -> None:
        """`decode`: seconds from the first token to the last one. The n sequences of a request run side by side."""
        longest = max(self._counts)
        if longest > 1:
            histogram.observe(decode / (longest - 1))
            self._metrics.recent_tpot.append((monotonic(), decode / (longest - 1)))


class TokenTimes:
    """Seconds between two tokens of a sequence, by `TOKEN_SECONDS_BUCKETS` and one bucket more.

    Plain numbers, since they change with every token: 0.3 us, a histogram of the library takes 1.5 us.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(TOKEN_SECONDS_BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(TOKEN_SECONDS_BUCKETS, seconds)] += 1
        self.total += seconds


class _TokenCollector(Collector):
    """Metrics that change with every token."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        """Nothing: names are known at a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        metrics, make = self._metrics, self._metrics.factory
        yield make.totals("prompt_tokens", "Tokens of prompts, with the first token.").add(metrics.prompt_tokens).metric
        yield make.totals("generation_tokens", "Tokens of outputs.").add(metrics.output_tokens).metric
        counts, total = list(metrics.token_times.counts), metrics.token_times.total
        for name in (
            "inter_token_latency_seconds",
            "time_per_output_token_seconds",
        ):  # its name in vLLM today, and before
            yield make.histogram_of(name, "Between two tokens of a sequence.", TOKEN_SECONDS_BUCKETS, counts, total)


router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse)
async def show_metrics(request: Request) -> Response:
    """Metrics for Prometheus. Its text format alone: in the others the library writes the colon of names as "_"."""
    return Response(await request.app.state.server.metrics.render(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})
