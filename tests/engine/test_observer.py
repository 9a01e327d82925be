"""Measured times reach the cost model with the right numbers."""

import pytest

from hetis.core.messages import StepTimes
from hetis.core.step_times import Activity, StageTimes
from hetis.cost.cost_model import CostModel
from hetis.engine.observer import Observer
from tests.dispatcher.fleets import device, link, make_cost
from tests.scheduler.toy_engine import make_plan

PLAN = make_plan([[4], [4]], 1)  # two stages of one layer, one worker: ranks 0, 1, 2
HEADS, TOKENS = 8, 400.0


def observed() -> tuple[Observer, CostModel]:
    cost = make_cost(PLAN, [device()] * 3, alpha_us=10.0, dense_us=50.0, num_layers=2)
    return Observer(cost, PLAN), cost


def times(
    rank: int, stage: int, /, heads: int = HEADS, prompt: int = 0, decodes: int = 1, to: int = 2, **activities: float
) -> StepTimes:
    activity_us = [0.0] * len(Activity)
    for name, value in activities.items():
        if name != "round_trip":
            activity_us[Activity[name.upper()]] = value
    round_trip_us = {to: activities["round_trip"]} if "round_trip" in activities else {}
    report = StageTimes(
        stage=stage,
        heads=heads,
        kv_tokens=TOKENS if heads else 0.0,
        activity_us=activity_us,
        round_trip_us=round_trip_us,
    )
    return StepTimes(rank=rank, step=0, num_decodes=decodes, num_prompt_tokens=prompt, stages=[report])


def predicted(cost: CostModel, rank: int) -> float:
    return cost.attention_us(rank, HEADS, TOKENS * cost.kv_bytes_per_token)


def test_attention_is_followed_and_compared() -> None:
    observer, cost = observed()
    first = predicted(cost, 0)
    for _ in range(100):
        observer.on_times(times(0, 0, attention=3 * first))
    assert predicted(cost, 0) == pytest.approx(3 * first, rel=0.05)
    assert predicted(cost, 1) == first, "other ranks are not affected"
    guess, measured = observer.mean_us(0)
    assert measured == pytest.approx(3 * first)
    assert first < guess < 3 * first


def test_a_rank_without_heads_drifts_back_to_its_profile() -> None:
    observer, cost = observed()
    first = predicted(cost, 2)
    for _ in range(100):
        observer.on_times(times(2, 0, attention=5 * first))
        observer.on_times(times(2, 1, attention=5 * first))
    slow = predicted(cost, 2)
    assert slow > 4 * first
    for _ in range(1000):
        observer.on_times(times(2, 0, heads=0, prompt=100, decodes=0))
        observer.on_times(times(2, 0, heads=0))
    assert predicted(cost, 2) == slow, "a rank that has only prompts, or works for another stage, is not idle"
    for _ in range(1000):
        observer.on_times(times(2, 1, heads=0))
    assert predicted(cost, 2) == pytest.approx(first, rel=0.01)


def test_steps_with_page_transfers_alone_are_ignored() -> None:
    observer, cost = observed()
    cost.add(2, device(), [link(0, 2, 10.0, beta_us_per_byte=0.001)])
    for _ in range(100):
        observer.on_times(times(0, 0, dense=50.0, attention=20.0))
    page_bytes = observer.page_bytes
    for _ in range(100):
        observer.on_times(times(0, 0, heads=0, decodes=0, dense=0.1, migration=1.0))
    assert cost.dense_us([0]) == 50.0
    assert observer.page_bytes == page_bytes
    assert page_bytes[2] > 0


def test_non_attention_time_is_followed_in_steps_without_prompts_only() -> None:
    observer, cost = observed()
    for _ in range(100):
        observer.on_times(times(0, 0, dense=70.0, other=10.0))
        observer.on_times(times(0, 0, prompt=100, dense=9000.0))
    assert cost.dense_us([0]) == pytest.approx(80.0, rel=0.01)
    assert cost.dense_us([1]) == 50.0


def test_waiting_for_another_stage_or_home_is_not_non_attention_time() -> None:
    """Ranks 0 and 1 compute layers together: rank 1 waits 60 us in each for the attention of rank 0."""
    plan = make_plan([[2, 2], [4]], 1)
    cost = make_cost(plan, [device()] * 4, num_layers=2)
    observer = Observer(cost, plan)
    for _ in range(100):
        observer.on_times(times(0, 0, dense=70.0, other=10.0, stage=500.0))
        observer.on_times(times(1, 0, dense=130.0, stage=500.0))
    assert cost.dense_us([0, 1]) == pytest.approx(80.0, rel=0.01)


def test_link_times_are_round_trips_less_the_attention_of_the_worker() -> None:
    observer, cost = observed()
    assert cost.link_us(2, HEADS) == pytest.approx(10.0)
    for _ in range(200):
        observer.on_times(times(2, 0, append=5.0, attention=100.0, send=5.0))
        observer.on_times(times(0, 0, dense=50.0, round_trip=150.0))
        observer.on_times(times(0, 0, prompt=100, dense=5000.0, round_trip=5000.0))
    assert cost.link_us(2, HEADS) == pytest.approx(50.0, rel=0.05)


def test_a_worker_serves_homes_and_stages() -> None:
    """84 us for each of two homes, one after the other, over a link of 20 us; another stage has other figures."""
    plan = make_plan([[2, 2], [4]], 1)
    cost = make_cost(plan, [device()] * 4, alpha_us=10.0, num_layers=2)
    observer = Observer(cost, plan)
    for _ in range(200):
        observer.on_times(times(3, 0, attention=168.0))
        observer.on_times(times(3, 1, heads=1, attention=7.0))
        observer.on_times(times(0, 0, to=3, round_trip=104.0))
        observer.on_times(times(1, 0, to=3, round_trip=188.0))
        observer.on_times(times(2, 1, to=3, round_trip=27.0))
    assert cost.link_us(3, HEADS) == pytest.approx(20.0, rel=0.05)


def test_a_round_trip_with_an_unknown_worker_is_ignored() -> None:
    observer, cost = observed()
    observer.on_times(times(0, 0, dense=50.0, round_trip=1e6))
    assert cost.link_us(2, HEADS) == pytest.approx(10.0)
