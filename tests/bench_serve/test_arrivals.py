"""Due times: mean, spread, determinism."""

import math

import numpy as np
import pytest

from hetis.bench_serve.arrivals import arrival_times
from hetis.bench_serve.settings import RampUp

SEED = (3, 0, 1)


def gaps(burstiness: float, count: int = 20_000) -> np.ndarray:
    return np.diff([0.0, *arrival_times(count, 5.0, burstiness, SEED, None)])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_of_their_gamma_distribution(burstiness: float) -> None:
    found = gaps(burstiness)
    assert found.min() >= 0
    assert found.mean() == pytest.approx(0.2)
    assert found.std() / found.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_gaps_of_a_poisson_process_are_exponential() -> None:
    found = np.sort(gaps(1.0))
    drawn, expected = np.arange(1, len(found) + 1) / len(found), 1 - np.exp(-5.0 * found)
    assert np.abs(drawn - expected).max() < 1.63 / len(found) ** 0.5  # Kolmogorov and Smirnov, 1 %


def test_the_last_request_is_due_at_count_over_rate() -> None:
    for seed in range(5):
        assert arrival_times(30, 4.0, 0.5, (seed, 0, 1), None)[-1] == pytest.approx(7.5)


def test_infinite_burstiness_is_a_constant_rate_and_infinite_rate_all_at_once() -> None:
    assert arrival_times(4, 2.0, math.inf, SEED, None) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert arrival_times(3, math.inf, 1.0, SEED, None) == [0.0] * 3
    assert arrival_times(0, 2.0, 1.0, SEED, None) == []


def test_the_seed_decides() -> None:
    first, again = (arrival_times(50, 3.0, 1.0, SEED, None) for _ in range(2))
    assert first == again
    assert first != arrival_times(50, 3.0, 1.0, (4, 0, 1), None)
    assert first != arrival_times(50, 3.0, 1.0, (3, 1, 1), None)


def test_ramps_grow_from_the_first_rate_to_the_last() -> None:
    def rates(ramp: RampUp) -> np.ndarray:
        return 1 / np.diff([0.0, *arrival_times(5, math.inf, math.inf, SEED, ramp)])

    assert rates(RampUp("linear", 2.0, 10.0)) == pytest.approx([2, 4, 6, 8, 10])
    assert rates(RampUp("exponential", 1.0, 16.0)) == pytest.approx([1, 2, 4, 8, 16])
