"""The solver of the min-max problem against enumeration and against what must always hold (HiGHS: `test_milp.py`)."""

from itertools import product
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.dispatcher.balance import balance, insert
from hetis.dispatcher.bound import is_possible, least_possible_us
from hetis.dispatcher.exchange import Exchange
from hetis.dispatcher.problem import Counts, Problem, longest_first, peak_us, times_us
from tests.dispatcher.instances import check_fits, tiny_problem
from tests.dispatcher.random_problems import random_problem


def all_counts(problem: Problem) -> list[Counts]:
    """Every placement that fits."""
    ways = [way for way in product(*(range(most + 1) for most in problem.most_lanes)) if sum(way) == problem.num_lanes]
    found = []
    for rows in product(ways, repeat=problem.num_sequences):
        counts = [list(column) for column in zip(*rows, strict=True)]
        taken = [
            sum(count * pages for count, pages in zip(held, problem.pages(device), strict=True))
            for device, held in enumerate(counts)
        ]
        if all(pages <= free for pages, free in zip(taken, problem.free_pages, strict=True)):
            found.append(counts)
    return found


def simple(start_us: list[float], each_us: list[float], num_lanes: int, **changes: object) -> Problem:
    """One sequence, one home, no floors, plenty of memory."""
    many = [1000] * len(start_us)
    problem = Problem(
        num_lanes=num_lanes,
        num_homes=1,
        start_us=start_us,
        floor_us=[0.0] * len(start_us),
        lane_us=[[cost] for cost in each_us],
        most_lanes=[num_lanes] * len(start_us),
        home_pages=[1],
        worker_pages=[1],
        free_pages=many,
    )
    return msgspec.structs.replace(problem, **changes)


@given(st.integers(0, 1 << 30), st.integers(1, 5))
@settings(max_examples=300)
def test_one_sequence_is_exact(seed: int, num_devices: int) -> None:
    problem = tiny_problem(Random(seed), 1, num_devices)
    every = all_counts(problem)
    counts = balance(problem)
    if not every:
        assert counts is None
        return
    assert counts is not None
    check_fits(problem, counts)
    best = min(peak_us(problem, other) for other in every)
    assert peak_us(problem, counts) == best
    homes = range(problem.num_homes)
    most_at_home = max(sum(o[h][0] for h in homes) for o in every if peak_us(problem, o) == best)
    assert sum(counts[h][0] for h in homes) == most_at_home, "ties go to primaries"


def test_a_few_sequences_are_near_the_best_of_all_ways() -> None:
    rng, compared = Random(3), 0
    while compared < 150:
        problem = tiny_problem(rng, rng.randint(2, 3), rng.randint(2, 4))
        if (problem.num_lanes + 1) ** (problem.num_devices * problem.num_sequences) > 10**8:
            continue
        every = all_counts(problem)
        counts = balance(problem)
        assert (counts is None) == (not every)
        if counts is not None:
            check_fits(problem, counts)
            assert peak_us(problem, counts) <= 1.02 * min(peak_us(problem, other) for other in every)
            compared += 1


@given(st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=150)
def test_placements_fit_and_are_the_same_each_time(seed: int, num_sequences: int, num_devices: int) -> None:
    problem = random_problem(Random(seed), num_sequences, num_devices)
    counts = balance(problem)
    assert counts == balance(problem)
    if counts is not None:
        check_fits(problem, counts)
        lowest = least_possible_us(problem, peak_us(problem, counts))
        assert lowest <= peak_us(problem, counts)


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
def test_another_device_never_raises_the_optimum(seed: int, num_devices: int) -> None:
    whole = random_problem(Random(seed), 1, num_devices)
    without = without_last_device(whole)
    before, after = balance(without), balance(whole)
    if whole.num_homes < num_devices and before is not None:
        assert after is not None
        assert peak_us(whole, after) <= peak_us(without, before)


def test_another_device_never_makes_several_sequences_slower_than_the_proven_gap() -> None:
    """The best of all ways gets no worse, and what the solver finds is within 2 % of it (`test_milp.py`)."""
    rng, compared, faster = Random(1), 0, 0
    while compared < 400:
        whole = random_problem(rng, rng.randint(2, 8), rng.randint(2, 8))
        if whole.num_homes == whole.num_devices:
            continue
        without = without_last_device(whole)
        before, after = balance(without), balance(whole)
        if before is not None:
            assert after is not None, "what fitted does not fit with one device more"
            assert peak_us(whole, after) <= 1.02 * peak_us(without, before)
            compared += 1
            faster += peak_us(whole, after) < 0.98 * peak_us(without, before)
    assert faster > 100, "most devices must be of use, or nothing is shown"


@given(st.integers(0, 1 << 30), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=150)
def test_one_device_that_gets_faster_never_raises_the_optimum_of_one(seed: int, at: int, num_devices: int) -> None:
    problem = random_problem(Random(seed), 1, num_devices)
    lane_us = [[cost * (0.5 if device == at else 1) for cost in row] for device, row in enumerate(problem.lane_us)]
    faster = msgspec.structs.replace(problem, lane_us=lane_us)
    slow, fast = balance(problem), balance(faster)
    assert (slow is None) == (fast is None)
    if slow is not None and fast is not None:
        assert peak_us(faster, fast) <= peak_us(problem, slow)


def test_constants_of_idle_devices_count_once_they_are_used() -> None:
    """A worker costs 10 us before its first lane: it stays idle until the home alone would take longer than that."""
    for num_lanes, expected in ((1, 0), (10, 0), (11, 0), (12, 1), (20, 5)):
        counts = balance(simple([0.0, 10.0], [1.0, 1.0], num_lanes))
        assert counts == [[num_lanes - expected], [expected]]


def test_a_floor_is_no_obstacle_once_it_is_reached() -> None:
    """The worker takes 6 us however little it does, and then as many lanes as fit into them."""
    problem = simple([0.0, 1.0], [1.0, 1.0], 5, floor_us=[0.0, 6.0])
    assert balance(problem) == [[5], [0]]
    problem = simple([0.0, 1.0], [1.0, 1.0], 11, floor_us=[0.0, 6.0])
    assert balance(problem) == [[6], [5]]


def test_a_busy_device_without_new_lanes_has_no_part_in_the_peak() -> None:
    """One that is far behind must not keep the others from being balanced."""
    counts = balance(simple([0.0, 0.0, 500.0], [1.0, 1.0, 1.0], 8))
    assert counts == [[4], [4], [0]]


def test_a_home_takes_its_own_groups_only() -> None:
    problem = simple([0.0, 0.0, 0.0], [1.0, 1.0, 9.0], 8, num_homes=2, most_lanes=[7, 1, 8])
    assert balance(problem) == [[7], [1], [0]]


def test_nothing_fits() -> None:
    assert balance(simple([0.0, 0.0], [1.0, 1.0], 4, free_pages=[2, 1])) is None
    two = simple([0.0], [1.0], 4, lane_us=[[1.0, 1.0]], home_pages=[1, 1], worker_pages=[1, 1], free_pages=[7])
    assert balance(two) is None


def test_no_sequence_needs_no_device() -> None:
    empty = simple([0.0, 0.0], [1.0, 1.0], 4, lane_us=[[], []], home_pages=[], worker_pages=[])
    assert balance(empty) == [[], []]


@pytest.mark.parametrize("seed", range(40))
def test_bounds_are_bounds(seed: int) -> None:
    """No limit that some placement keeps is ever called impossible."""
    rng = Random(seed)
    problem = tiny_problem(rng, 2, rng.randint(1, 3))
    for counts in all_counts(problem):
        assert is_possible(problem, peak_us(problem, counts) * (1 + 1e-9))


@given(st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=300)
def test_what_was_reached_is_possible(seed: int, num_sequences: int, num_devices: int) -> None:
    problem = random_problem(Random(seed), num_sequences, num_devices)
    counts = balance(problem)
    if counts is not None:
        assert is_possible(problem, peak_us(problem, counts) * (1 + 1e-9))


def test_a_bound_may_be_as_high_as_the_optimum() -> None:
    """Pages are what is scarce on the faster device: 3 lanes there, 5 on the other."""
    problem = simple([0.0, 0.0], [4.0, 1.0], 8, home_pages=[1], worker_pages=[2], free_pages=[100, 6])
    assert balance(problem) == [[5], [3]]
    assert is_possible(problem, 20.0 + 1e-9)
    assert not is_possible(problem, 20.0 - 1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_exchanges_never_make_it_worse(seed: int) -> None:
    rng = Random(seed)
    problem = random_problem(rng, rng.randint(2, 8), rng.randint(2, 8))
    counts = insert(problem, longest_first(problem))
    if counts is not None:
        exchange = Exchange(problem, counts)
        exchange.descend()
        check_fits(problem, exchange.counts())
        assert max(times_us(problem, exchange.counts())) <= max(times_us(problem, counts)) * (1 + 1e-12)
