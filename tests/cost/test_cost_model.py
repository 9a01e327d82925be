"""Predictions by hand, and factors that follow devices whose speed changes."""

from random import Random

import pytest

from hetis.core.profile import AttentionProfile, DeviceProfile, FleetProfile, LinkProfile, TransferProfile
from hetis.cost.cost_model import LARGEST_FACTOR, SMALLEST_FACTOR, CostModel
from tests.dispatcher.fleets import KEY, make_spec


def profile(**attention: float) -> DeviceProfile:
    return DeviceProfile(key=KEY, attention=AttentionProfile(**attention), read_bytes_per_us=1.0, usable_bytes=0)


def way(alpha_us: float, beta_us_per_byte: float) -> TransferProfile:
    return TransferProfile(alpha_us=alpha_us, beta_us_per_byte=beta_us_per_byte)


SLOW = LinkProfile(primary=1, worker=2, request=way(4.0, 1e-3), reply=way(5.0, 2e-3))
FAST = LinkProfile(primary=0, worker=2, request=way(1.0, 1e-4), reply=way(1.0, 1e-4))


def model(windows: tuple[int, ...] = ()) -> CostModel:
    """Rank 2 is a worker of primaries 0 and 1. M = 2, D = 64, float32."""
    devices = {
        0: profile(us_per_head=0.1, us_per_byte=1e-5, constant_us=3.0),
        1: profile(us_per_head=0.1, us_per_byte=1e-5, constant_us=3.0, floor_us=20.0),
        2: profile(us_per_head=0.5, us_per_byte=4e-5, constant_us=2.0),
    }
    spec = make_spec(4, num_layers=max(1, len(windows)), windows=windows)
    return CostModel(FleetProfile(devices=devices, links=(FAST, SLOW)), spec, "float32")


def test_attention_by_hand() -> None:
    cost = model()
    assert cost.attention_us(0, 0, 0) == 0
    assert cost.attention_us(0, 8, 100_000) == pytest.approx(0.8 + 1.0 + 3.0)
    assert cost.attention_us(1, 8, 100_000) == 20.0


def test_bytes_of_a_lane() -> None:
    """512 bytes per token: K and V of 64 floats. Layers with windows read no more than these."""
    assert model().kv_bytes(10) == 5120
    assert model(windows=(0, 4, 8, 0)).kv_bytes(10) == pytest.approx(512 * (10 + 4 + 8 + 10) / 4)


def test_the_slowest_link_of_a_worker_counts() -> None:
    """Request of one lane: 2 queries, key and value of 256 bytes. Reply: 2 outputs."""
    cost = model()
    request, reply = 4 * 256, 2 * 256
    assert cost.link_us(2, 2) == pytest.approx(4.0 + 5.0 + request * 1e-3 + reply * 2e-3)
    assert cost.link_us(2, 0) == 0
    rates = cost.rates(2, is_worker=True)
    assert rates.time_us(6, 1e6) == pytest.approx(cost.attention_us(2, 6, 1e6) + cost.link_us(2, 6))
    assert cost.prompt_us_per_byte(2) == 1e-3


def test_prompts_go_in_large_messages() -> None:
    large = TransferProfile(alpha_us=1.0, beta_us_per_byte=1e-4, large_bytes=1e6, more_us_per_byte=2e-4)
    cost = model()
    cost.add(
        2,
        profile(us_per_head=1.0, us_per_byte=0.0, constant_us=0.0),
        [LinkProfile(primary=0, worker=2, request=large, reply=way(1.0, 0.0))],
    )
    assert cost.prompt_us_per_byte(2) == pytest.approx(3e-4)
    assert cost.link_us(2, 2) == pytest.approx(2.0 + 4 * 256 * 1e-4)


def slowed(cost: CostModel, factor: float, rng: Random, steps: int, rank: int = 0) -> None:
    truth = model()
    for _ in range(steps):
        heads, kv_bytes = rng.randint(4, 40), rng.randint(10**5, 10**7)
        exact = factor * truth.attention_us(rank, heads, kv_bytes)
        cost.observe(rank, heads, kv_bytes, exact * rng.uniform(0.9, 1.1))


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_device_that_changes_is_followed_and_followed_back(factor: float, rank: int) -> None:
    cost, rng = model(), Random(1)
    slowed(cost, factor, rng, 60, rank)
    for heads, kv_bytes in ((8, 10**6), (30, 8 * 10**6)):
        expected = factor * model().attention_us(rank, heads, kv_bytes)
        assert cost.attention_us(rank, heads, kv_bytes) == pytest.approx(expected, rel=0.15)
    slowed(cost, 1.0, rng, 60, rank)
    assert cost.attention_us(rank, 20, 10**6) == pytest.approx(model().attention_us(rank, 20, 10**6), rel=0.15)


def test_one_mix_of_work_corrects_all_terms() -> None:
    """Throttled to a quarter and measured at one operating point only: the factors of all terms grow."""
    cost = model()
    for _ in range(50):
        cost.observe(0, 8, 10**6, 4 * model().attention_us(0, 8, 10**6))
    for heads, kv_bytes in ((1, 10**4), (64, 10**7)):
        assert 2.5 < cost.attention_us(0, heads, kv_bytes) / model().attention_us(0, heads, kv_bytes) < 5.5


def test_wild_measurements_stay_bounded_and_are_forgotten() -> None:
    cost, rng = model(), Random(2)
    for _ in range(3000):
        cost.observe(0, rng.randint(1, 64), rng.randint(1, 10**7), 10 ** rng.uniform(-6, 9))
    assert all(SMALLEST_FACTOR <= factor <= LARGEST_FACTOR for factor in cost.factors(0))
    slowed(cost, 1.0, rng, 300)
    assert cost.attention_us(0, 20, 10**6) == pytest.approx(model().attention_us(0, 20, 10**6), rel=0.15)


def test_one_outlier_changes_little() -> None:
    cost, rng = model(), Random(3)
    slowed(cost, 1.0, rng, 100)
    cost.observe(0, 8, 10**6, 1000 * model().attention_us(0, 8, 10**6))
    assert cost.attention_us(0, 8, 10**6) < 1.5 * model().attention_us(0, 8, 10**6)


def test_factors_do_not_drift_without_excitation() -> None:
    """Tens of thousands of steps with one mix of work: no wind-up."""
    cost, rng = model(), Random(4)
    for _ in range(20_000):
        cost.observe(0, 8, 10**6, model().attention_us(0, 8, 10**6) * rng.uniform(0.8, 1.2))
    assert all(0.4 < factor < 2.5 for factor in cost.factors(0))


def test_the_factors_of_an_idle_device_return_to_the_profile() -> None:
    """Without heads it is not measured, and it must be used again at some time."""
    cost, rng = model(), Random(5)
    slowed(cost, 10.0, rng, 100)
    before = cost.attention_us(0, 8, 10**6)
    for _ in range(500):
        cost.relax([0, 99])
    assert cost.attention_us(0, 8, 10**6) < before / 5
    cost.observe(0, 0, 0, 5.0)
    cost.observe(99, 8, 8, 5.0)


def test_links_are_followed() -> None:
    cost = model()
    for _ in range(60):
        cost.observe_link(2, 8, 3 * model().link_us(2, 8))
    assert cost.link_us(2, 8) == pytest.approx(3 * model().link_us(2, 8), rel=0.1)
    assert cost.attention_us(2, 8, 0) == model().attention_us(2, 8, 0)


def test_ranks_join_and_leave() -> None:
    cost = model()
    cost.remove(1)
    assert cost.ranks == [0, 2]
    with pytest.raises(ValueError, match=r"rank 1 has no profile; the profile has ranks \[0, 2\]"):
        cost.attention_us(1, 1, 1)
    cost.add(1, profile(us_per_head=1.0, us_per_byte=0.0, constant_us=0.0))
    assert cost.attention_us(1, 3, 10**9) == 3.0
