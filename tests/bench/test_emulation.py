"""Components of the fleet benchmark: workloads, metrics, slow links, slow devices."""

from pathlib import Path

import pytest
import torch
from emulation.client import Timeline
from emulation.device import CALL_S, CORE_BYTES_PER_S, Device
from emulation.fleet import Fleet, Link, Member
from emulation.metrics import kv_peak, measure, tokens_per_s
from emulation.slow_link import SlowLink, padded
from emulation.workload import Lengths, Workload, make_requests, read_trace

from hetis.comm.links.local import local_pair

LENGTHS = Lengths(log_mean=5.0, log_std=0.8, scale=2, smallest=4, largest=200)
WORKLOAD = Workload(num_requests=400, rate_per_s=8.0, context=LENGTHS, generated=LENGTHS)


class Clock:
    """Seconds, which pass only in `sleep_until` or where a test advances them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def ns(self) -> int:
        return round(self.now * 1e9)

    def sleep_until(self, at_s: float) -> None:
        self.now = max(self.now, at_s)


# --- workloads --------------------------------------------------------------------------------------------------------


def test_one_seed_is_one_workload() -> None:
    first, again = (make_requests(WORKLOAD, 1000) for _ in range(2))
    assert first == again
    assert [r.arrival_s for r in first] == sorted(r.arrival_s for r in first)
    assert first[-1].arrival_s == pytest.approx(400 / 8.0, rel=0.2)
    assert all(4 <= len(r.token_ids) <= 200 and 4 <= r.num_generated <= 200 for r in first)
    assert all(5 <= token < 1000 for r in first for token in r.token_ids)


def test_a_trace_gives_the_lengths(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n1,100,50\n2,1000,2\n")
    requests = make_requests(WORKLOAD, 1000, read_trace(path))
    assert {(len(r.token_ids), r.num_generated) for r in requests} == {(50, 25), (200, 4)}
    for text in ("a,b\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no trace"):
            read_trace(path)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_two_requests() -> None:
    timelines = [
        Timeline(arrival_s=0.0, num_context=10, token_s=[1.0, 2.0, 3.0]),
        Timeline(arrival_s=1.0, num_context=20, token_s=[2.5, 4.5]),
    ]
    found = measure(timelines, (2.0, 4.0))
    assert found.tokens_per_s == 5 / 4.5
    assert found.ttft_p50 == 1250.0
    assert found.tpot_p50 == 1500.0
    assert found.window_tokens_per_s == 3 / 2
    assert tokens_per_s(timelines, 3.0, 3.0) == 0.0
    assert kv_peak(timelines) == (10 + 3) + (20 + 1), "at 3 s, before the first request finishes"


# --- links ------------------------------------------------------------------------------------------------------------


def send(link: SlowLink, num_bytes: int, value: int) -> None:
    link.send_buffer(num_bytes).fill_(value)
    link.send()


def test_a_slow_link_adds_latency_and_transfer_time() -> None:
    """At 10 ms of latency and 1 MB/s, 1,000 bytes take 1 ms on the line, and a second message follows the first."""
    clock, speed = Clock(), Link(latency_ms=10.0, megabytes_per_s=1.0)
    limit = padded(1000)
    primary, worker = (
        SlowLink(end, speed, now_ns=clock.ns, sleep_until=clock.sleep_until) for end in local_pair(limit, limit)
    )
    send(primary, 1000, 1)
    send(primary, 1000, 2)
    assert clock.now == 100.0, "the sender does not wait"
    for number, due in ((1, 100.011), (2, 100.012)):
        message = worker.recv(1000)
        assert message.unique().tolist() == [number]
        assert clock.now == pytest.approx(due, abs=1e-7)
        worker.release()
    send(worker, 7, 3)
    assert primary.recv(7).tolist() == [3] * 7
    assert clock.now == pytest.approx(100.022007, abs=1e-7)
    assert (worker.num_awaited, primary.num_awaited) == (2, 1)
    assert (primary.bytes_sent, primary.bytes_received) == (2000, 7)


def test_a_late_receiver_does_not_wait() -> None:
    clock = Clock()
    primary, worker = (
        SlowLink(end, Link(latency_ms=5.0), now_ns=clock.ns, sleep_until=clock.sleep_until)
        for end in local_pair(padded(8), padded(8))
    )
    send(primary, 8, 1)
    clock.now += 1.0
    worker.recv(8)
    assert clock.now == 101.0
    assert worker.num_awaited == 0


# --- devices ----------------------------------------------------------------------------------------------------------


def test_a_device_takes_the_time_of_its_share() -> None:
    """2 ms of work at a share of a quarter take 8 ms plus the call; the share may change at any time."""
    clock, share = Clock(), [0.25]
    device = Device(lambda: share[0], wall=clock, cpu=clock, sleep_until=clock.sleep_until)

    def kernel() -> None:
        clock.now += 0.002 + CALL_S

    device.run_bound_by_memory(kernel)
    assert clock.now == pytest.approx(100.0 + CALL_S + 0.008)
    share[0] = 0.5
    device.run_bound_by_memory(kernel)
    assert clock.now == pytest.approx(100.0 + 2 * CALL_S + 0.012)
    assert device.work_s / device.busy_s == pytest.approx(1 / 3)


def test_a_linear_layer_takes_at_least_the_time_to_read_its_weight() -> None:
    clock = Clock()
    device = Device(lambda: 0.5, wall=clock, cpu=clock, sleep_until=clock.sleep_until)
    device.run_linear(int(CORE_BYTES_PER_S), lambda: torch.ones(1))
    assert clock.now == pytest.approx(102.0)

    def long_kernel() -> None:
        clock.now += 5.0

    device.run_linear(int(CORE_BYTES_PER_S), long_kernel)
    assert clock.now == pytest.approx(107.0)


# --- fleets -----------------------------------------------------------------------------------------------------------


def test_impossible_fleets_are_refused() -> None:
    with pytest.raises(ValueError, match="share is 0"):
        Member(kv_tokens=100, share=0.0)
    with pytest.raises(ValueError, match="kv_tokens is 0"):
        Member(kv_tokens=0)
    with pytest.raises(ValueError, match="add up to 1"):
        Fleet(primary=Member(kv_tokens=100), workers=(Member(kv_tokens=100, share=0.5),) * 2)
