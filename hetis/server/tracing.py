"""OpenTelemetry: one span per request, a child of the client's span, sent to a collector. Needs the extra `otel`.

Attributes are those of vLLM: usage, the parameters of the request and its latencies, under `gen_ai.`. Prompts and
outputs are not in spans.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from hetis.server.metrics import RequestMeter
from hetis.server.telemetry_options import traces_url

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from hetis.core.sampling_params import SamplingParams
    from hetis.frontend.requests import Request

_PARAMETERS = ("n", "max_tokens", "temperature", "top_p", "top_k")


class Span(Protocol):
    def finish(self, meter: RequestMeter) -> None:
        """Ends the span of a request that is finished, with all that was measured."""


class Tracing(Protocol):
    def begin(self, headers: Mapping[str, str], name: str, request: "Request", params: "SamplingParams") -> Span:
        """A span that begins now. `headers`: of HTTP, perhaps with the client's `traceparent`. `name`: endpoint."""

    def close(self) -> None:
        """Sends what has not been sent yet; some seconds at most if the collector does not answer."""


class NoSpan:
    """The span of a request that is not traced."""

    def finish(self, meter: RequestMeter) -> None:
        del meter


class NoTracing:
    """Tracing that is off."""

    def begin(self, headers: Mapping[str, str], name: str, request: "Request", params: "SamplingParams") -> NoSpan:
        del headers, name, request, params
        return _NO_SPAN

    def close(self) -> None: ...


_NO_SPAN = NoSpan()


class OtelTracing:
    """Spans by OpenTelemetry's SDK, sent in batches by a thread of its own."""

    def __init__(self, exporter: "SpanExporter", model_name: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._model_name, self._kind = model_name, SpanKind.SERVER
        self._extract = TraceContextTextMapPropagator().extract
        # environment variables such as OTEL_SERVICE_NAME have precedence
        self._provider = TracerProvider(resource=Resource.create({"service.name": "hetis"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("hetis")

    def begin(self, headers: Mapping[str, str], name: str, request: "Request", params: "SamplingParams") -> "OtelSpan":
        carrier = {key: headers[key] for key in ("traceparent", "tracestate") if key in headers}
        attributes: dict[str, Any] = {"gen_ai.request.id": request.id, "gen_ai.response.model": self._model_name}
        for parameter in _PARAMETERS:
            value = getattr(params, parameter)
            if value is not None:
                attributes[f"gen_ai.request.{parameter}"] = value
        span = self._tracer.start_span(name, self._extract(carrier), self._kind, attributes)
        return OtelSpan(span)

    def close(self) -> None:
        self._provider.shutdown()


class OtelSpan:
    """One request."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def finish(self, meter: RequestMeter) -> None:
        assert meter.end is not None, "the request is finished"
        span, end_ns = self._span, time.time_ns() - int(1e9 * (time.monotonic() - meter.end))
        span.set_attributes(
            {"gen_ai.usage.prompt_tokens": meter.prompt_tokens, "gen_ai.usage.completion_tokens": meter.output_tokens}
        )
        span.set_attributes({f"gen_ai.latency.{name}": seconds for name, seconds in _latencies(meter).items()})
        span.set_attribute("gen_ai.response.finish_reasons", [meter.reason])
        for name, stamp in (("scheduled", _scheduled(meter)), ("first_token", meter.first_token)):
            if stamp is not None:
                span.add_event(name, timestamp=end_ns - int(1e9 * (meter.end - stamp)))
        if meter.reason == "error":
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR)
        span.end(end_ns)


def _latencies(meter: RequestMeter) -> dict[str, float]:
    """Seconds, as far as they are known."""
    assert meter.end is not None, "the request is finished"
    found: dict[str, float | None] = {
        "e2e": meter.end - meter.begin,
        "time_in_queue": meter.queued_s,
        "time_in_model_prefill": meter.prefill_s,
    }
    if meter.first_token is not None and meter.last_token is not None:
        decode = meter.last_token - meter.first_token
        found["time_to_first_token"] = meter.first_token - meter.begin
        found["time_in_model_decode"] = decode
        found["time_in_model_inference"] = None if meter.prefill_s is None else meter.prefill_s + decode
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def _scheduled(meter: RequestMeter) -> float | None:
    """The moment when the request left the queue, on the meter's clock; None if it never did."""
    return None if meter.queued_s is None else meter.begin + meter.queued_s


def make_tracing(endpoint: str | None, model_name: str) -> Tracing:
    """Tracing to a collector that takes OTLP over HTTP; off for None. Raises ValueError as `traces_url`."""
    if endpoint is None:
        return NoTracing()
    url = traces_url(endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OtelTracing(OTLPSpanExporter(endpoint=url), model_name)
