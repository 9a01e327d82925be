"""Fits to samples of known coefficients, with and without noise, and too few samples."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.core.measurements import AttentionSample, DenseSample, PrefillSample, TransferSample
from hetis.core.profile import AttentionProfile, DenseProfile, PrefillProfile, TransferProfile
from hetis.cost.fit import fit_attention, fit_dense, fit_prefill, fit_transfer, non_negative

HEADS = [8 * 2**k for k in range(8)]
KV_BYTES = [2**k for k in range(16, 30, 2)]


def grid(truth: AttentionProfile, rng: Random, noise: float) -> list[AttentionSample]:
    return [
        AttentionSample(heads, kv_bytes, truth.time_us(heads, kv_bytes) * rng.uniform(1 - noise, 1 + noise))
        for heads in HEADS
        for kv_bytes in KV_BYTES
    ]


def test_a_straight_line_is_found_exactly() -> None:
    truth = AttentionProfile(us_per_head=0.05, us_per_byte=2.5e-5, constant_us=4.0)
    found = fit_attention(grid(truth, Random(0), 0.0))
    assert found.floor_us == 0
    assert found.accuracy == pytest.approx(1.0, abs=1e-6)
    assert [found.us_per_head, found.us_per_byte, found.constant_us] == pytest.approx([0.05, 2.5e-5, 4.0])


@pytest.mark.parametrize("seed", range(5))
def test_noise_lowers_the_accuracy_but_makes_no_floor(seed: int) -> None:
    truth = AttentionProfile(us_per_head=0.05, us_per_byte=2.5e-5, constant_us=4.0)
    found = fit_attention(grid(truth, Random(seed), 0.08))
    assert found.floor_us == 0
    assert 0.94 <= found.accuracy < 1
    assert found.time_us(256, 1 << 24) == pytest.approx(truth.time_us(256, 1 << 24), rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_a_floor_is_found_where_a_line_alone_is_not_enough(seed: int) -> None:
    """As on a GPU: up to some load the time is constant."""
    truth = AttentionProfile(us_per_head=0.012, us_per_byte=7e-7, constant_us=3.0, floor_us=14.0)
    samples = grid(truth, Random(seed), 0.03)
    found = fit_attention(samples)
    assert found.floor_us == pytest.approx(14.0, rel=0.05)
    assert found.accuracy >= 0.96
    line = non_negative(np.array([[s.heads, s.kv_bytes, 1.0] for s in samples]), np.array([s.time_us for s in samples]))
    without = AttentionProfile(us_per_head=line[0], us_per_byte=line[1], constant_us=line[2])
    errors = [abs(without.time_us(s.heads, s.kv_bytes) / s.time_us - 1) for s in samples]
    assert sum(errors) / len(errors) > 2 * (1 - found.accuracy)


def test_links() -> None:
    rng, truth = Random(1), TransferProfile(alpha_us=12.0, beta_us_per_byte=8e-5)
    sizes = [2**k for k in range(6, 24)]
    found = fit_transfer([TransferSample(n, truth.time_us(n) * rng.uniform(0.97, 1.03)) for n in sizes])
    assert found.alpha_us == pytest.approx(12.0, rel=0.05)
    assert found.beta_us_per_byte == pytest.approx(8e-5, rel=0.05)
    assert found.more_us_per_byte == 0
    assert found.accuracy > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_large_messages_may_be_slower(seed: int) -> None:
    rng = Random(seed)
    truth = TransferProfile(alpha_us=20.0, beta_us_per_byte=1e-4, large_bytes=1 << 20, more_us_per_byte=1.5e-4)
    sizes = [round(2 ** (k / 2)) for k in range(18, 48)]
    found = fit_transfer([TransferSample(n, truth.time_us(n) * rng.uniform(0.97, 1.03)) for n in sizes])
    assert found.accuracy > 0.93
    assert found.large_bytes == truth.large_bytes
    for size in (1000, 200_000, 8_000_000):
        assert found.time_us(size) == pytest.approx(truth.time_us(size), rel=0.1)


def test_dense_time_has_two_pieces() -> None:
    rng, truth = Random(2), DenseProfile(fixed_us=20.0, us_per_weight_byte=7e-7, us_per_flop=5e-9)
    weights = 10**8

    def time_us(tokens: int) -> float:
        return truth.time_us(2 * weights, 2.0 * weights * tokens)

    samples = [DenseSample(2**k, time_us(2**k) * rng.uniform(0.98, 1.02)) for k in range(13)]
    found = fit_dense(samples, weights, 2 * weights)
    assert found.us_per_flop == pytest.approx(5e-9, rel=0.1)
    assert found.accuracy > 0.93
    for tokens in (1, 64, 100, 1000):
        expected = time_us(tokens)
        assert found.time_us(2 * weights, 2.0 * weights * tokens) == pytest.approx(expected, rel=0.1)


def test_prefill() -> None:
    truth = PrefillProfile(fixed_us=10.0, us_per_pair=2e-4)
    found = fit_prefill([PrefillSample(n, truth.time_us(n)) for n in (10**k for k in range(1, 9))])
    assert found.time_us(12345) == pytest.approx(truth.time_us(12345))


@given(st.integers(0, 1 << 30))
@settings(max_examples=60)
def test_no_coefficient_is_negative_and_none_could_be_better(seed: int) -> None:
    """Compared with random points near the result."""
    rng = np.random.default_rng(seed)
    features, times = rng.uniform(0.1, 10, (12, 3)), rng.uniform(1, 20, 12)
    found = np.array(non_negative(features, times))

    def error(coefficients: np.ndarray) -> float:
        return float(((features @ coefficients / times - 1) ** 2).sum())

    assert (found >= 0).all()
    for _ in range(200):
        other = np.maximum(0, found + rng.normal(0, 0.02, 3))
        assert error(found) <= error(other) + 1e-9


def test_too_few_points() -> None:
    with pytest.raises(ValueError, match="measure at least 8 points"):
        fit_transfer([TransferSample(1, 1.0)] * 5)
