"""The mixed integer program against enumeration, and the solver against it."""

import logging
from functools import partial
from random import Random

import msgspec
import pytest

from hetis.dispatcher import milp
from hetis.dispatcher.balance import balance, homeward
from hetis.dispatcher.milp import balance_by_highs, solve
from hetis.dispatcher.problem import peak_us
from tests.dispatcher.instances import check_fits, tiny_problem
from tests.dispatcher.random_problems import random_problem
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


def test_ties_go_to_primaries_here_too() -> None:
    """No lane is left on a worker that could be at home without a longer peak; HiGHS alone leaves some.

    Floors that are high make ties of nearly all placements.
    """
    rng, num_lifted = Random(0), 0
    for _ in range(60):
        problem = tiny_problem(rng, rng.randint(1, 3), rng.randint(2, 4))
        problem = msgspec.structs.replace(problem, floor_us=[60.0] * problem.num_devices)
        solution, counts = solve(problem), balance_by_highs(problem)
        if solution is None or counts is None:
            continue
        check_fits(problem, counts)
        assert peak_us(problem, counts) <= peak_us(problem, solution.counts)
        num_lifted += counts != solution.counts
        assert homeward(problem, [list(held) for held in counts]) == counts
    assert num_lifted


def test_our_own_solver_decides_where_highs_has_no_time_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    problem = random_problem(Random(3), 16, 16)
    with pytest.raises(TimeoutError, match=r"within 0\.0 s"):
        solve(problem, time_limit_s=0.0)
    monkeypatch.setattr(milp, "solve", partial(solve, time_limit_s=0.0))
    with caplog.at_level(logging.WARNING):
        assert balance_by_highs(problem) == balance_by_highs(problem) == balance(problem)
    assert len(caplog.records) == 1


def test_highs_can_take_the_solvers_place() -> None:
    problem = random_problem(Random(5), 2, 3)
    counts, other = balance(problem), balance_by_highs(problem)
    assert counts is not None
    assert other is not None
    assert peak_us(problem, other) <= peak_us(problem, counts) * (1 + 1e-6)
