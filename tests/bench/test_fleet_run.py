"""One run of `bench_fleet.py` from its client's side, under next to no load, and what is printed of it."""

import threading

import bench_fleet
import prove
import pytest
from emulation import client
from emulation.client import Throttle
from emulation.fleet import Fleet, Link, Member
from emulation.model import ModelShape
from emulation.workload import Lengths, Workload, make_requests
from fleet_report import check_requirements, table
from fleet_scenarios import Case, Requirement, Scenario

from hetis import EngineDeadError
from tests.processes.look import wait_until

pytestmark = pytest.mark.process

MODEL = ModelShape(
    hidden_size=64, intermediate_size=64, num_layers=2, num_head_groups=2, queries_per_group=1, head_dim=32,
    vocab_size=200,
)  # fmt: skip
FLEET = Fleet(primary=Member(kv_tokens=2000), workers=(Member(kv_tokens=2000, share=0.5, link=Link(latency_ms=1.0)),))
CASE = Case(label="some", fleet=FLEET, dispatch="even", throttles=(Throttle(at_s=0.0, rank=1, share=0.25),))
FEW = Lengths(log_mean=2.0, log_std=0.1, smallest=4, largest=9)
SCENARIO = Scenario(
    model=MODEL,
    max_num_seqs=2,
    workload=Workload(num_requests=3, rate_per_s=20.0, context=FEW, generated=FEW),
    cases=(CASE,),
    requirements=(Requirement(metric="tokens_per_s", of="some", over="some", bound=1.0),),
)


def test_a_run_gives_metrics_counters_and_reached_shares() -> None:
    requests = make_requests(SCENARIO.workload, MODEL.vocab_size)
    row = bench_fleet.run_case("tiny", SCENARIO, CASE, requests, 0, None)
    assert row.metrics.tokens_per_s > 0
    assert row.metrics.ttft_p95 > 0
    assert row.counted.steps >= max(request.num_generated for request in requests)
    assert all(tokens > 0 for tokens in row.counted.kv_peak_tokens), "both ranks hold lanes"
    primary, worker = row.measured
    assert primary.share == 1.0, "it is not slowed"
    assert 0 < worker.share < 1
    assert min(primary.delay_ms, worker.delay_ms) > 0, "the link is slow both ways"
    figures = prove.read_figures(prove.FLEET, bench_fleet.progress(row))
    assert figures.keys() == {"some tokens_per_s", "some tpot_p95_ms", "some ttft_p95_ms"}
    assert "some" in table([row])
    assert [is_met for _, is_met in check_requirements(SCENARIO.requirements, [row])] == [True]
    assert bench_fleet.describe(requests, SCENARIO)


def test_a_client_that_cannot_send_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AttributeError("planted: the method has another name now")

    shown: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(client, "play", fail)
    monkeypatch.setattr(threading, "excepthook", shown.append)
    with pytest.raises(EngineDeadError, match="closed"):
        bench_fleet.run_case("tiny", SCENARIO, CASE, make_requests(SCENARIO.workload, MODEL.vocab_size), 0, None)
    wait_until(lambda: shown, "the error of the thread is shown")
