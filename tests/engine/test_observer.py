"""What ranks report reaches the cost model with the right numbers."""

import pytest

from hetis.core.messages import StepTimes
from hetis.core.times import Span, StageTimes
from hetis.cost.cost_model import CostModel
from hetis.engine.observer import Observer
from tests.dispatcher.fleets import device, make_cost
from tests.scheduler.toy_engine import make_plan

PLAN = make_plan([[4], [4]], 1)  # two stages of one layer, one worker: ranks 0, 1, 2
HEADS, TOKENS = 8, 400.0


def observed() -> tuple[Observer, CostModel]:
    cost = make_cost(PLAN, [device()] * 3, alpha_us=10.0, dense_us=50.0, num_layers=2)
    return Observer(cost, PLAN), cost


def times(rank: int, stage: int, heads: int = HEADS, prompt: int = 0, **spans: float) -> StepTimes:
    span_us = [0.0] * len(Span)
    for name, value in spans.items():
        if name != "round_trip":
            span_us[Span[name.upper()]] = value
    round_trip_us = {2: spans["round_trip"]} if "round_trip" in spans else {}
    report = StageTimes(
        stage=stage,
        heads=heads,
        kv_tokens=TOKENS if heads else 0.0,
        num_prompt_tokens=prompt,
        span_us=span_us,
        round_trip_us=round_trip_us,
    )
    return StepTimes(rank=rank, step=0, stages=[report])


def predicted(cost: CostModel, rank: int) -> float:
    return cost.attention_us(rank, HEADS, TOKENS * cost.kv_bytes_per_token)


def test_attention_is_followed_and_compared() -> None:
    observer, cost = observed()
    first = predicted(cost, 0)
    for _ in range(100):
        observer.on_times(times(0, 0, attention=3 * first))
    assert predicted(cost, 0) == pytest.approx(3 * first, rel=0.05)
    assert predicted(cost, 1) == first, "others are not"
    guess, measured = observer.mean_us(0)
    assert measured == pytest.approx(3 * first)
    assert first < guess < 3 * first


def test_a_rank_without_heads_drifts_back_to_its_profile() -> None:
    observer, cost = observed()
    first = predicted(cost, 2)
    for _ in range(100):
        observer.on_times(times(2, 0, attention=5 * first))
    assert predicted(cost, 2) > 4 * first
    for _ in range(1000):
        observer.on_times(times(2, 0, heads=0))
    assert predicted(cost, 2) == pytest.approx(first, rel=0.01)


def test_the_dense_part_counts_without_prompts_only() -> None:
    observer, cost = observed()
    for _ in range(100):
        observer.on_times(times(0, 0, dense=70.0, other=10.0))
        observer.on_times(times(0, 0, prompt=100, dense=9000.0))
    assert cost.dense_us([0]) == pytest.approx(80.0, rel=0.01)
    assert cost.dense_us([1]) == 50.0


def test_links_are_round_trips_less_what_the_worker_did() -> None:
    observer, cost = observed()
    assert cost.link_us(2, HEADS) == pytest.approx(10.0)
    for _ in range(200):
        observer.on_times(times(2, 0, append=5.0, attention=100.0, send=5.0))
        observer.on_times(times(0, 0, dense=50.0, round_trip=150.0))
        observer.on_times(times(0, 0, prompt=100, dense=5000.0, round_trip=5000.0))
    assert cost.link_us(2, HEADS) == pytest.approx(50.0, rel=0.05)


def test_a_round_trip_with_an_unknown_worker_says_nothing() -> None:
    observer, cost = observed()
    observer.on_times(times(0, 0, dense=50.0, round_trip=1e6))
    assert cost.link_us(2, HEADS) == pytest.approx(10.0)
