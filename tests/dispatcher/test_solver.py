"""Both solvers of the placement problem against enumeration and HiGHS, and against what must always hold."""

from math import inf
from random import Random
from statistics import mean

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.dispatcher.insertion import InsertionSolver
from hetis.dispatcher.native import NativeSolver
from hetis.dispatcher.problem import Counts, Problem, makespan_us
from hetis.dispatcher.solver import Solver
from tests.dispatcher.highs import solve_exactly
from tests.dispatcher.random_problems import random_problem
from tests.dispatcher.small_problems import all_counts, check_counts, num_counts, tiny_problem

ROUNDING = 1 + 1e-9


def simple(start_us: list[float], each_us: list[float], num_lanes: int, **changes: object) -> Problem:
    """One sequence, one home, no floors, plenty of memory."""
    problem = Problem(
        num_lanes=num_lanes,
        num_homes=1,
        start_us=start_us,
        floor_us=[0.0] * len(start_us),
        lane_us=[[cost] for cost in each_us],
        most_lanes=[num_lanes] * len(start_us),
        home_pages=[1],
        worker_pages=[1],
        free_pages=[1000] * len(start_us),
    )
    return msgspec.structs.replace(problem, **changes)


# --- one sequence -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 30), st.integers(1, 5))
@settings(max_examples=300)
def test_one_sequence_is_exact(solver: Solver, seed: int, num_devices: int) -> None:
    problem = tiny_problem(Random(seed), 1, num_devices)
    every, counts = all_counts(problem), solver.solve(problem)
    assert (counts is None) == (not every)
    if counts is not None:
        check_counts(problem, counts)
        assert makespan_us(problem, counts) == min(makespan_us(problem, other) for other in every)


@given(st.integers(0, 1 << 30), st.integers(1, 5))
@settings(max_examples=300)
def test_of_the_optima_of_one_sequence_the_one_with_most_lanes_at_home_is_chosen(
    native_solver: NativeSolver, seed: int, num_devices: int
) -> None:
    problem = tiny_problem(Random(seed), 1, num_devices)
    counts = native_solver.solve(problem)
    if counts is not None:
        best_us = makespan_us(problem, counts)
        optima = [other for other in all_counts(problem) if makespan_us(problem, other) == best_us]
        assert num_at_home(problem, counts) == max(num_at_home(problem, other) for other in optima)


def num_at_home(problem: Problem, counts: Counts) -> int:
    return sum(map(sum, counts[: problem.num_homes]))


def without_last_device(problem: Problem) -> Problem:
    return msgspec.structs.replace(
        problem,
        start_us=problem.start_us[:-1],
        floor_us=problem.floor_us[:-1],
        lane_us=problem.lane_us[:-1],
        most_lanes=problem.most_lanes[:-1],
        free_pages=problem.free_pages[:-1],
    )


@given(st.integers(0, 1 << 30), st.integers(2, 8))
@settings(max_examples=150)
def test_another_device_never_raises_the_optimum(solver: Solver, seed: int, num_devices: int) -> None:
    whole = random_problem(Random(seed), 1, num_devices)
    without = without_last_device(whole)
    before = solver.solve(without) if whole.num_homes < num_devices else None
    if before is not None:
        after = solver.solve(whole)
        assert after is not None
        assert makespan_us(whole, after) <= makespan_us(without, before)


@given(st.integers(0, 1 << 30), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=150)
def test_a_device_that_gets_faster_never_raises_the_optimum(
    solver: Solver, seed: int, at: int, num_devices: int
) -> None:
    problem = random_problem(Random(seed), 1, num_devices)
    lane_us = [[cost * (0.5 if device == at else 1) for cost in row] for device, row in enumerate(problem.lane_us)]
    faster = msgspec.structs.replace(problem, lane_us=lane_us)
    slow, fast = solver.solve(problem), solver.solve(faster)
    assert (slow is None) == (fast is None)
    if slow is not None and fast is not None:
        assert makespan_us(faster, fast) <= makespan_us(problem, slow)


def test_constants_of_idle_devices_count_once_they_are_used(solver: Solver) -> None:
    """A worker costs 10 us before its first lane: it stays idle until the home alone would take longer than that."""
    for num_lanes, expected in ((1, 0), (10, 0), (11, 0), (12, 1), (20, 5)):
        counts = solver.solve(simple([0.0, 10.0], [1.0, 1.0], num_lanes))
        assert counts == [[num_lanes - expected], [expected]]


def test_a_floor_is_no_obstacle_once_it_is_reached(solver: Solver) -> None:
    """The worker takes 6 us however little it does, and then as many lanes as fit into them."""
    problem = simple([0.0, 1.0], [1.0, 1.0], 5, floor_us=[0.0, 6.0])
    assert solver.solve(problem) == [[5], [0]]
    problem = simple([0.0, 1.0], [1.0, 1.0], 11, floor_us=[0.0, 6.0])
    assert solver.solve(problem) == [[6], [5]]


def test_a_busy_device_without_new_lanes_has_no_part_in_the_makespan(solver: Solver) -> None:
    """One that is far behind must not keep the others from being balanced."""
    counts = solver.solve(simple([0.0, 0.0, 500.0], [1.0, 1.0, 1.0], 8))
    assert counts == [[4], [4], [0]]


def test_a_home_takes_its_own_groups_only(solver: Solver) -> None:
    problem = simple([0.0, 0.0, 0.0], [1.0, 1.0, 9.0], 8, num_homes=2, most_lanes=[7, 1, 8])
    assert solver.solve(problem) == [[7], [1], [0]]


def test_nothing_fits(solver: Solver) -> None:
    assert solver.solve(simple([0.0, 0.0], [1.0, 1.0], 4, free_pages=[2, 1])) is None
    two = simple([0.0], [1.0], 4, lane_us=[[1.0, 1.0]], home_pages=[1, 1], worker_pages=[1, 1], free_pages=[7])
    assert solver.solve(two) is None


# --- several sequences ------------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=150)
def test_placements_fit_and_are_the_same_each_time(
    solver: Solver, seed: int, num_sequences: int, num_devices: int
) -> None:
    problem = random_problem(Random(seed), num_sequences, num_devices)
    counts = solver.solve(problem)
    assert counts == solver.solve(problem)
    if counts is not None:
        check_counts(problem, counts)


@given(st.integers(0, 1 << 30), st.integers(1, 12), st.integers(1, 6), st.booleans())
@settings(max_examples=300)
def test_insertion_is_never_better(
    native_solver: NativeSolver, seed: int, num_sequences: int, num_devices: int, is_tiny: bool
) -> None:
    make = tiny_problem if is_tiny else random_problem
    problem = make(Random(seed), num_sequences, num_devices)
    inserted, counts = InsertionSolver().solve(problem), native_solver.solve(problem)
    if inserted is not None:
        assert counts is not None
        check_counts(problem, counts)
        assert makespan_us(problem, counts) <= makespan_us(problem, inserted) * ROUNDING


def test_a_few_sequences_are_near_the_optimum(native_solver: NativeSolver) -> None:
    rng, compared = Random(3), 0
    while compared < 150:
        problem = tiny_problem(rng, rng.randint(2, 3), rng.randint(2, 4))
        if num_counts(problem) > 10**8:
            continue
        every, counts = all_counts(problem), native_solver.solve(problem)
        assert (counts is None) == (not every)
        if counts is not None:
            check_counts(problem, counts)
            assert makespan_us(problem, counts) <= 1.02 * min(makespan_us(problem, other) for other in every)
            compared += 1


def test_many_sequences_are_within_two_percent_of_the_optimum(native_solver: NativeSolver) -> None:
    """Against HiGHS's proven lower bound, on 210 random problems of up to 8 sequences and 8 devices."""
    rng, compared = Random(0), 0
    while compared < 210:
        problem = random_problem(rng, rng.randint(1, 8), rng.randint(2, 8))
        solution, counts = solve_exactly(problem, relative_gap=3e-3), native_solver.solve(problem)
        assert (solution is None) == (counts is None)
        if solution is not None and counts is not None:
            check_counts(problem, counts)
            assert makespan_us(problem, counts) <= 1.02 * max(solution.bound_us, 1e-9)
            compared += 1


@pytest.mark.parametrize(("size", "worst", "average"), [((4, 8), 1.10, 1.01), ((8, 8), 1.25, 1.03)])
def test_insertion_alone_is_not_far_behind(
    native_solver: NativeSolver, size: tuple[int, int], worst: float, average: float
) -> None:
    """Where it finds a placement, as on all of these; on problems made to mislead it nothing is promised."""
    rng, ratios = Random(0), []
    for _ in range(150):
        problem = random_problem(rng, *size)
        counts, inserted = native_solver.solve(problem), InsertionSolver().solve(problem)
        assert (counts is None) == (inserted is None)
        if counts is not None and inserted is not None:
            check_counts(problem, inserted)
            ratios.append(makespan_us(problem, inserted) / makespan_us(problem, counts))
    assert len(ratios) > 100
    assert max(ratios) < worst
    assert mean(ratios) < average


def test_another_device_never_makes_several_sequences_slower_than_the_proven_gap(native_solver: NativeSolver) -> None:
    """The optimum does not rise, and the solver is within 2 % of it."""
    rng, compared, faster = Random(1), 0, 0
    while compared < 400:
        whole = random_problem(rng, rng.randint(2, 8), rng.randint(2, 8))
        if whole.num_homes == whole.num_devices:
            continue
        without = without_last_device(whole)
        before, after = native_solver.solve(without), native_solver.solve(whole)
        if before is not None:
            assert after is not None, "what fitted does not fit with one device more"
            assert makespan_us(whole, after) <= 1.02 * makespan_us(without, before)
            compared += 1
            faster += makespan_us(whole, after) < 0.98 * makespan_us(without, before)
    assert faster > 100, "most devices must be of use, or nothing is shown"


def test_no_lane_is_on_a_worker_that_could_be_at_home(native_solver: NativeSolver) -> None:
    """High floors make ties of nearly all placements; of the optima that HiGHS finds some have such lanes."""
    rng, num_others = Random(0), 0
    for _ in range(60):
        problem = tiny_problem(rng, rng.randint(1, 3), rng.randint(2, 4))
        problem = msgspec.structs.replace(problem, floor_us=[60.0] * problem.num_devices)
        counts, solution = native_solver.solve(problem), solve_exactly(problem)
        if counts is not None and solution is not None:
            assert not could_go_home(problem, counts)
            num_others += could_go_home(problem, solution.counts)
    assert num_others, "or the property is no achievement"


def could_go_home(problem: Problem, counts: Counts) -> bool:
    """Whether some lane on a worker fits at a home without a larger makespan."""
    makespan = makespan_us(problem, counts)
    for home in range(problem.num_homes):
        pages = sum(count * each for count, each in zip(counts[home], problem.home_pages, strict=True))
        for j, held in enumerate(counts[home]):
            is_away = any(worker[j] for worker in counts[problem.num_homes :])
            fits = pages + problem.home_pages[j] <= problem.free_pages[home] and held < problem.most_lanes[home]
            changed = [list(row) for row in counts]
            changed[home][j] += 1
            if is_away and fits and makespan_us(problem, changed) <= makespan:
                return True
    return False


# --- lower bounds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_no_placement_is_below_the_bound(solver: Solver, seed: int) -> None:
    rng = Random(seed)
    problem = tiny_problem(rng, 2, rng.randint(1, 3))
    makespans = [makespan_us(problem, counts) for counts in all_counts(problem)]
    for reached_us in makespans:
        assert solver.lower_bound_us(problem, reached_us) <= min(makespans) * ROUNDING


@given(st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=300)
def test_the_bound_is_no_higher_than_what_was_reached(
    solver: Solver, native_solver: NativeSolver, seed: int, num_sequences: int, num_devices: int
) -> None:
    problem = random_problem(Random(seed), num_sequences, num_devices)
    counts = native_solver.solve(problem)
    if counts is not None:
        reached_us = makespan_us(problem, counts)
        bound_us = solver.lower_bound_us(problem, reached_us)
        assert 0 <= bound_us <= reached_us
        assert solver.lower_bound_us(problem, reached_us, reached_us) == bound_us


def test_the_bound_may_be_as_high_as_the_optimum(native_solver: NativeSolver) -> None:
    """Pages are what is scarce on the faster device: 3 lanes there, 5 on the other."""
    problem = simple([0.0, 0.0], [4.0, 1.0], 8, home_pages=[1], worker_pages=[2], free_pages=[100, 6])
    assert native_solver.solve(problem) == [[5], [3]]
    assert 20.0 * 0.999 <= native_solver.lower_bound_us(problem, 20.0) <= 20.0


def test_a_bound_above_what_is_enough_is_infinite(solver: Solver) -> None:
    problem = simple([0.0, 2.0], [1.0, 1.0], 8)
    assert solver.lower_bound_us(problem, 8.0, 4.9) == inf
    assert solver.lower_bound_us(problem, 8.0, 5.1) == pytest.approx(5.0, rel=2e-3)


@given(st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=150)
def test_fixed_prices_are_exact_for_devices_that_differ_by_a_factor(
    seed: int, num_sequences: int, num_devices: int
) -> None:
    """Then the fractional optimum gives every device that is used the same share of every sequence."""
    rng = Random(seed)
    speeds = [rng.uniform(0.1, 4) for _ in range(num_devices)]
    lengths = [rng.uniform(1, 100) for _ in range(num_sequences)]
    problem = simple(
        [0.0] * num_devices,
        speeds,
        4,
        lane_us=[[length / speed for length in lengths] for speed in speeds],
        home_pages=[0] * num_sequences,
        worker_pages=[0] * num_sequences,
    )
    bound_us = InsertionSolver().lower_bound_us(problem, 1e9)
    assert bound_us == pytest.approx(4 * sum(lengths) / sum(speeds))
