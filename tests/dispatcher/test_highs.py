"""The oracle for larger problems against the one for small ones."""

from random import Random

import pytest

from hetis.dispatcher.problem import makespan_us
from tests.dispatcher.highs import solve_exactly
from tests.dispatcher.random_problems import random_problem
from tests.dispatcher.small_problems import all_counts, check_counts, tiny_problem


@pytest.mark.parametrize("seed", range(30))
def test_highs_finds_the_optimum(seed: int) -> None:
    rng = Random(seed)
    problem = tiny_problem(rng, rng.randint(1, 2), rng.randint(1, 3))
    every, solution = all_counts(problem), solve_exactly(problem)
    if not every:
        assert solution is None
        return
    assert solution is not None
    check_counts(problem, solution.counts)
    best_us = min(makespan_us(problem, counts) for counts in every)
    assert makespan_us(problem, solution.counts) == pytest.approx(best_us, rel=1e-3)
    assert solution.bound_us <= best_us * (1 + 1e-6)


def test_too_little_time_is_an_error() -> None:
    with pytest.raises(TimeoutError, match=r"within 0\.0 s"):
        solve_exactly(random_problem(Random(3), 16, 16), time_limit_s=0.0)
