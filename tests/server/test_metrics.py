"""Metrics as a scraper reads them, against a stand-in of the engine and on a clock of the test."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from hetis.core.outputs import MODEL_FAILED
from hetis.core.sampling_params import SamplingParams
from hetis.server import metrics as module
from hetis.server.metrics import Metrics, RequestMeter, router
from hetis.server.sampler import FleetSampler
from tests.server.watched_engine import FakePiece, FakeRequest, WatchedEngine, make_snapshot

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]
DEVICE = {"rank": "1", "role": "attention worker", "device": "cpu", "device_name": "CPU"}


class Clock:
    """The clock of meters."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "monotonic", found)
    return found


def make_metrics(engine: Any = None, prefix: str = "hetis:") -> Metrics:
    return Metrics(FleetSampler(engine or WatchedEngine()), "tiny", prefix)


def scrape(metrics: Metrics) -> Samples:
    """By name and labels; without those that all have."""
    body = asyncio.run(metrics.render())
    found: Samples = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("model_name", "engine")}
            found.setdefault(sample.name, {})[tuple(sorted(labels.items()))] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"hetis:{name}"][tuple(sorted(labels.items()))]


def count_and_sum(samples: Samples, name: str) -> tuple[float, float]:
    return value(samples, f"{name}_count"), value(samples, f"{name}_sum")


# --- names ------------------------------------------------------------------------------------------------------------

VLLM_NAMES = """
    num_requests_running num_requests_waiting kv_cache_usage_perc num_preemptions_total prompt_tokens_total
    generation_tokens_total request_success_total request_prompt_tokens_bucket request_generation_tokens_bucket
    iteration_tokens_total_bucket request_params_n_bucket request_params_max_tokens_bucket
    time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket time_per_output_token_seconds_bucket
    e2e_request_latency_seconds_bucket request_queue_time_seconds_bucket request_prefill_time_seconds_bucket
    request_decode_time_seconds_bucket request_inference_time_seconds_bucket
    request_time_per_output_token_seconds_bucket request_max_num_generation_tokens_bucket
"""


@pytest.mark.parametrize(("prefix", "begin"), [("hetis:", "hetis:"), ("vllm", "vllm:"), ("vllm:", "vllm:"), ("", "")])
def test_names_are_those_of_vllm_under_any_prefix(prefix: str, begin: str) -> None:
    samples = scrape(make_metrics(prefix=prefix))
    assert {f"{begin}{name}" for name in VLLM_NAMES.split()} <= samples.keys()
    assert "process_resident_memory_bytes" in samples


@pytest.mark.parametrize("prefix", ["9", "a b", "vllm::", "a-b", "{"])
def test_a_prefix_that_cannot_begin_a_name_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="metrics_prefix is"):
        make_metrics(prefix=prefix)


def test_all_samples_name_the_model_and_the_engine() -> None:
    body = asyncio.run(make_metrics().render())
    for family in text_string_to_metric_families(body.decode()):
        if family.name.startswith("hetis:"):
            for sample in family.samples:
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0"), sample


def test_two_servers_in_one_process_count_apart() -> None:
    one, other = make_metrics(), make_metrics()
    one.begin(FakeRequest(), "/v1/completions").finish("stop")  # type: ignore[arg-type]
    assert value(scrape(one), "request_success_total", finished_reason="stop") == 1
    assert value(scrape(other), "request_success_total", finished_reason="stop") == 0


# --- requests ---------------------------------------------------------------------------------------------------------


def begin(metrics: Metrics, request: FakeRequest) -> RequestMeter:
    return metrics.begin(request, "/v1/completions")  # type: ignore[arg-type]


def take(meter: RequestMeter, **piece: Any) -> None:
    meter.on_piece(FakePiece(**piece))  # type: ignore[arg-type]


def test_a_request_is_measured_from_begin_to_end(clock: Clock) -> None:
    metrics, request = make_metrics(), FakeRequest()
    meter = begin(metrics, request)
    clock.now += 3.0
    request.queued_s, request.prefill_s = 1.0, 1.5
    take(meter)
    for _ in range(3):
        clock.now += 0.25
        take(meter)
    clock.now += 0.25
    take(meter, token_ids=[], finish_reason="length")
    meter.finish("length")
    meter.finish("abort")
    samples = scrape(metrics)
    assert count_and_sum(samples, "time_to_first_token_seconds") == (1, 3.0)
    assert count_and_sum(samples, "inter_token_latency_seconds") == (3, 0.75)
    assert count_and_sum(samples, "time_per_output_token_seconds") == (3, 0.75)
    assert value(samples, "inter_token_latency_seconds_bucket", le="0.2") == 0
    assert value(samples, "inter_token_latency_seconds_bucket", le="0.3") == 3
    assert value(samples, "inter_token_latency_seconds_bucket", le="+Inf") == 3
    assert count_and_sum(samples, "e2e_request_latency_seconds") == (1, 4.0)
    assert count_and_sum(samples, "request_queue_time_seconds") == (1, 1.0)
    assert count_and_sum(samples, "request_prefill_time_seconds") == (1, 1.5)
    assert count_and_sum(samples, "request_decode_time_seconds") == (1, 0.75)
    assert count_and_sum(samples, "request_inference_time_seconds") == (1, 2.25)
    assert count_and_sum(samples, "request_time_per_output_token_seconds") == (1, 0.25)
    assert count_and_sum(samples, "request_prompt_tokens") == (1, 10)
    assert count_and_sum(samples, "request_generation_tokens") == (1, 4)
    assert count_and_sum(samples, "request_params_n") == (1, 1)
    assert count_and_sum(samples, "request_params_max_tokens") == (1, 8)
    assert (value(samples, "prompt_tokens_total"), value(samples, "generation_tokens_total")) == (10, 4)
    assert value(samples, "request_success_total", finished_reason="length") == 1
    assert value(samples, "stream_errors_total") == 0
    assert (metrics.num_finished, metrics.num_failed) == (1, 0)


def test_completions_are_counted_each_by_its_end(clock: Clock) -> None:
    metrics = make_metrics()
    meter = begin(metrics, FakeRequest(params=SamplingParams(n=3)))
    for index in (0, 1, 2):
        take(meter, index=index)
    clock.now += 1.0
    take(meter, index=0, finish_reason="stop")
    take(meter, index=1, token_ids=[], finish_reason="length")
    meter.finish("abort")
    samples = scrape(metrics)
    found = {reason: value(samples, "request_success_total", finished_reason=reason) for reason in module.REASONS}
    assert found == {"stop": 1, "length": 1, "abort": 1, "error": 0}
    assert count_and_sum(samples, "request_generation_tokens") == (3, 4)
    assert count_and_sum(samples, "request_max_num_generation_tokens") == (1, 2), "the longest of the three"
    assert count_and_sum(samples, "time_to_first_token_seconds") == (1, 0.0)
    assert count_and_sum(samples, "inter_token_latency_seconds") == (1, 1.0)
    assert (metrics.num_finished, metrics.num_failed) == (0, 0), "the request was aborted"


@pytest.mark.parametrize(("num_tokens", "late"), [(0, 0), (1, 1)])
def test_errors_after_the_first_token_are_counted_apart(num_tokens: int, late: int) -> None:
    metrics = make_metrics()
    meter = begin(metrics, FakeRequest())
    take(meter, token_ids=[7] * num_tokens)
    take(meter, token_ids=[], finish_reason="error")
    meter.finish("error")
    samples = scrape(metrics)
    assert value(samples, "request_success_total", finished_reason="error") == 1
    assert value(samples, "stream_errors_total") == late
    assert value(samples, "prompt_tokens_total") == 10 * late, "the prompt was not computed before"
    assert metrics.num_failed == 1


@pytest.mark.parametrize(("error", "count"), [(MODEL_FAILED, 1), ("it can never run.", 0)])
def test_logits_that_are_not_finite_are_counted(error: str, count: int) -> None:
    metrics = make_metrics()
    take(begin(metrics, FakeRequest()), token_ids=[], finish_reason="error", error=error)
    assert value(scrape(metrics), "nan_logits_total") == count


def test_a_request_that_ends_in_the_queue_has_no_times_of_tokens() -> None:
    metrics = make_metrics()
    begin(metrics, FakeRequest()).finish("abort")
    samples = scrape(metrics)
    for name in ("time_to_first_token", "request_decode_time", "request_queue_time", "request_prefill_time"):
        assert value(samples, f"{name}_seconds_count") == 0
    assert value(samples, "e2e_request_latency_seconds_count") == 1


# --- the fleet --------------------------------------------------------------------------------------------------------


def test_the_fleet_is_shown_by_device() -> None:
    samples = scrape(make_metrics(WatchedEngine(make_snapshot(8.0))))
    assert value(samples, "num_requests_running") == 2
    assert value(samples, "num_requests_waiting") == 1
    assert value(samples, "kv_cache_usage_perc") == 0.25
    assert value(samples, "num_preemptions_total") == 3
    assert value(samples, "engine_steps_total") == 7
    assert value(samples, "device_kv_pages_used", **DEVICE) == 11
    assert value(samples, "device_kv_pages", **DEVICE) == 40
    assert value(samples, "device_heads", **DEVICE) == 8
    assert value(samples, "device_busy_seconds_total", **DEVICE) == 4.0
    assert value(samples, "device_wait_seconds_total", **DEVICE) == 2.0
    assert value(samples, "device_attention_seconds_total", **DEVICE) == 1.0
    assert value(samples, "device_attention_predicted_seconds", **DEVICE) == pytest.approx(1e-4)
    assert value(samples, "device_attention_measured_seconds", **DEVICE) == pytest.approx(1.2e-4)
    assert value(samples, "device_link_bytes_total", **DEVICE, peer="0", direction="received") == 8000
    assert value(samples, "device_link_bytes_total", **DEVICE, peer="0", direction="sent") == 4000
    assert value(samples, "device_migrations_total", **DEVICE, direction="in") == 3
    assert value(samples, "device_migrations_total", **DEVICE, direction="out") == 1
    assert (value(samples, "migrations_total"), value(samples, "migrated_bytes_total")) == (4, 4096)
    assert (value(samples, "rebalances_total"), value(samples, "reliefs_total")) == (1, 2)
    assert value(samples, "dispatches_total") == 5
    assert count_and_sum(samples, "iteration_tokens_total") == (4, 20_003)
    assert value(samples, "iteration_tokens_total_bucket", le="16384.0") == 3


def test_scrapes_share_snapshots_and_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SNAPSHOT_SECONDS", 1e6)
    engine = WatchedEngine()
    metrics = make_metrics(engine)

    async def run() -> None:
        await asyncio.gather(*(metrics.render() for _ in range(5)))
        await metrics.render()

    asyncio.run(run())
    assert len(engine.queries) == 1


def test_a_silent_driver_delays_no_scrape_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last values are served, and it is asked one question until it answers."""
    engine = WatchedEngine()
    metrics = make_metrics(engine)
    monkeypatch.setattr(module, "SNAPSHOT_SECONDS", 0.0)
    monkeypatch.setattr(FleetSampler.refresh, "__defaults__", (0.01,))

    async def run() -> None:
        await metrics.render()
        engine.answers.clear()
        engine.snapshot = make_snapshot(8.0)
        for _ in range(3):
            body = await metrics.render()
            assert b"hetis:device_kv_pages_used{" in body
        assert len(engine.queries) == 2
        engine.answers.set()
        body = await metrics.render()
        assert b"hetis:fleet_snapshot_age_seconds" in body

    asyncio.run(run())
    assert value(scrape(metrics), "device_busy_seconds_total", **DEVICE) == 4.0


def test_before_the_driver_has_answered_and_after_its_end_there_is_something_to_scrape() -> None:
    engine = WatchedEngine()
    engine.is_dead = True
    samples = scrape(make_metrics(engine))
    assert "hetis:num_requests_running" not in samples
    assert value(samples, "generation_tokens_total") == 0


def test_the_route_serves_the_text() -> None:
    app = FastAPI()
    app.include_router(router)
    app.state.server = SimpleNamespace(metrics=make_metrics())

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})

    response = asyncio.run(run())
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    assert "hetis:num_requests_running{" in response.text
