"""Spans as OpenTelemetry's SDK exports them."""

import importlib
import time
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from hetis.core.sampling_params import SamplingParams
from hetis.server import metrics as metrics_module
from hetis.server import telemetry_options
from hetis.server.metrics import Metrics
from hetis.server.options import ServerOptions
from hetis.server.sampler import FleetSampler
from hetis.server.tracing import NoTracing, OtelTracing, make_tracing
from tests.server.watched_engine import FakePiece, FakeRequest, WatchedEngine

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def trace(
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str] | None = None,
    reason: str = "stop",
    num_tokens: int = 4,
    **params: Any,
) -> ReadableSpan:
    """The span of a request that waits for 1 s, has its first token after 3 s, and ends after 5 s."""
    now = time.monotonic()
    monkeypatch.setattr(metrics_module, "monotonic", lambda: now)
    exporter = InMemorySpanExporter()
    tracing = OtelTracing(exporter, "tiny")
    request = FakeRequest(params=SamplingParams(**params))
    span = tracing.begin(headers or {}, "/v1/completions", request, request.params)  # type: ignore[arg-type]
    metrics = Metrics(FleetSampler(WatchedEngine()), "tiny")  # type: ignore[arg-type]
    meter = metrics.begin(request, "/v1/completions")  # type: ignore[arg-type]
    if num_tokens:
        request.queued_s, request.prefill_s = 1.0, 1.5
    for number in range(num_tokens):
        now += 3.0 if number == 0 else 0.5
        meter.on_piece(FakePiece())  # type: ignore[arg-type]
    now += 0.5
    meter.finish(reason)
    span.finish(meter)
    tracing.close()
    (found,) = exporter.get_finished_spans()
    return found


def test_a_span_has_usage_parameters_and_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    span = trace(monkeypatch, n=1, max_tokens=8, temperature=0.5, top_p=0.9)
    assert span.name == "/v1/completions"
    assert span.kind is SpanKind.SERVER
    assert span.resource.attributes["service.name"] == "hetis"
    assert span.attributes is not None
    assert {name: value for name, value in span.attributes.items() if "latency" not in name} == {
        "gen_ai.request.id": "cmpl-1",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 0,
        "gen_ai.usage.prompt_tokens": 10,
        "gen_ai.usage.completion_tokens": 4,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    latencies = {name.rpartition(".")[2]: value for name, value in span.attributes.items() if "latency" in name}
    assert latencies == pytest.approx(
        {
            "e2e": 5.0,
            "time_in_queue": 1.0,
            "time_to_first_token": 3.0,
            "time_in_model_prefill": 1.5,
            "time_in_model_decode": 1.5,
            "time_in_model_inference": 3.0,
        }
    )


def test_events_are_placed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    span = trace(monkeypatch)
    assert span.end_time is not None
    before_end = {event.name: (span.end_time - event.timestamp) / 1e9 for event in span.events}
    assert before_end == pytest.approx({"scheduled": 4.0, "first_token": 2.0}, abs=1e-6)


@pytest.mark.parametrize("headers", [{}, {"traceparent": "garbage"}, {"traceparent": PARENT, "tracestate": "vendor=1"}])
def test_the_span_continues_the_client_s_trace(headers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    span = trace(monkeypatch, headers)
    context = span.get_span_context()
    assert context is not None
    if "tracestate" not in headers:
        assert span.parent is None
        return
    assert span.parent is not None
    assert f"{context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    assert context.trace_state["vendor"] == "1"


def test_a_failed_request_is_an_error_and_one_without_tokens_has_no_latencies_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    span = trace(monkeypatch, reason="error", num_tokens=0)
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert [name for name in span.attributes if "latency" in name] == ["gen_ai.latency.e2e"]
    assert span.events == ()


def test_without_an_endpoint_nothing_is_traced() -> None:
    tracing = make_tracing(None, "tiny")
    assert isinstance(tracing, NoTracing)
    request = FakeRequest()
    metrics = Metrics(FleetSampler(WatchedEngine()), "tiny")  # type: ignore[arg-type]
    meter = metrics.begin(request, "")  # type: ignore[arg-type]
    tracing.begin({}, "", request, request.params).finish(meter)  # type: ignore[arg-type]
    tracing.close()


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "grpc://localhost:4317", "http://"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="otlp_traces_endpoint is"):
        make_tracing(endpoint, "tiny")


@pytest.mark.parametrize(
    ("endpoint", "sent_to"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("http://localhost:4318/", "http://localhost:4318/v1/traces"),
        ("https://collector/custom", "https://collector/custom"),
    ],
)
def test_the_path_of_otlp_is_added(endpoint: str, sent_to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exporters = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    used: list[str] = []
    monkeypatch.setattr(exporters, "OTLPSpanExporter", lambda endpoint: used.append(endpoint) or InMemorySpanExporter())
    make_tracing(endpoint, "tiny").close()
    assert used == [sent_to]


@pytest.mark.parametrize("missing", ["opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"])
def test_a_missing_package_is_said_in_one_sentence(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_options, "is_installed", lambda module: module != missing)
    with pytest.raises(ValueError, match=r"pip install 'hetis\[otel\]'"):
        ServerOptions(otlp_traces_endpoint="http://localhost:4318")


def test_packages_are_found_without_being_loaded() -> None:
    assert telemetry_options.is_installed("opentelemetry.sdk")
    assert not telemetry_options.is_installed("opentelemetry.exporter.nowhere.proto")
    assert not telemetry_options.is_installed("no_such_package.sdk")
