"""The mixed integer program against enumeration, and the solver against it."""

from random import Random

import pytest

from bench.dispatch_problems import random_problem
from hetis.dispatcher.balance import balance
from hetis.dispatcher.milp import balance_by_highs, solve
from hetis.dispatcher.problem import peak_us
from tests.dispatcher.instances import check_fits, tiny_problem
from tests.dispatcher.test_balance import all_counts

pytest.importorskip("scipy")


@pytest.mark.parametrize("seed", range(30))
def test_highs_finds_the_best_of_all_ways(seed: int) -> None:
    rng = Random(seed)
    problem = tiny_problem(rng, rng.randint(1, 2), rng.randint(1, 3))
    every, solution = all_counts(problem), solve(problem)
    if not every:
        assert solution is None
        return
    assert solution is not None
    check_fits(problem, solution.counts)
    best = min(peak_us(problem, counts) for counts in every)
    assert peak_us(problem, solution.counts) == pytest.approx(best, rel=1e-3)
    assert solution.bound_us <= best * (1 + 1e-6)


def test_many_sequences_are_within_two_percent_of_the_optimum() -> None:
    """Against HiGHS's proven lower bound, on 210 random problems of up to 8 sequences and 8 devices."""
    rng, compared = Random(0), 0
    while compared < 210:
        problem = random_problem(rng, rng.randint(1, 8), rng.randint(2, 8))
        solution, counts = solve(problem, relative_gap=3e-3, time_limit_s=10), balance(problem)
        assert (solution is None) == (counts is None)
        if solution is not None and counts is not None:
            check_fits(problem, counts)
            assert peak_us(problem, counts) <= 1.02 * max(solution.bound_us, 1e-9)
            compared += 1


def test_highs_can_take_the_solvers_place() -> None:
    problem = random_problem(Random(5), 2, 3)
    counts, other = balance(problem), balance_by_highs(problem)
    assert counts is not None
    assert other is not None
    assert peak_us(problem, other) <= peak_us(problem, counts) * (1 + 1e-6)
