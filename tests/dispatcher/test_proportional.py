"""The proportional rule against enumerating everything."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.core.placement import FleetView, Placement, PoolId, pools_of
from hetis.core.plan import Plan
from hetis.core.request import Sequence
from hetis.cost.memory import largest_context
from hetis.dispatcher.room import pages_of, shortage_when_empty
from hetis.dispatcher.simple_dispatchers import ProportionalDispatcher, spread
from tests.dispatcher.fleets import PAGE_SIZE, make_view
from tests.scheduler.toy_engine import make_plan, make_sequence


def assign(view: FleetView, *sequences: Sequence) -> list[Placement | None]:
    return ProportionalDispatcher().assign(list(sequences), view)


def naive_spread(num_lanes: int, weights: list[int], capacities: list[int]) -> list[int] | None:
    """All ways, by squared distance to the exact shares; the one that favours early places among equals."""
    total = sum(weights)
    ways = product(*(range(min(num_lanes, capacity) + 1) for capacity in capacities))
    fitting = [way for way in ways if sum(way) == num_lanes]
    if not fitting:
        return None

    def distance(way: tuple[int, ...]) -> int:
        return sum((count * total - num_lanes * weight) ** 2 for count, weight in zip(way, weights, strict=True))

    return list(min(fitting, key=lambda way: (distance(way), [-count for count in way])))


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 7)), min_size=1, max_size=4).filter(
        lambda places: any(weight for weight, _ in places)
    ),
)
@settings(max_examples=400)
def test_spread_is_the_best_of_all_ways(num_lanes: int, places: list[tuple[int, int]]) -> None:
    weights, capacities = [list(column) for column in zip(*places, strict=True)]
    assert spread(num_lanes, weights, capacities) == naive_spread(num_lanes, weights, capacities)


@given(st.integers(1, 12), st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any))
@settings(max_examples=200)
def test_spread_without_limits_is_the_largest_remainder(num_lanes: int, weights: list[int]) -> None:
    total = sum(weights)
    counts = [num_lanes * weight // total for weight in weights]
    remainders = [num_lanes * weight % total for weight in weights]
    for place in sorted(range(len(weights)), key=lambda i: -remainders[i])[: num_lanes - sum(counts)]:
        counts[place] += 1
    assert spread(num_lanes, weights, [num_lanes] * len(weights)) == counts


def test_lanes_follow_free_pages_and_ties_go_to_the_primary() -> None:
    plan = make_plan([[8]], 2)
    [placement] = assign(make_view(plan, [200, 100, 100]), make_sequence(0, 4, 100))
    assert placement == Placement(owners=((0, 0, 0, 0, 1, 1, 2, 2),))
    [placement] = assign(make_view(plan, [100, 100, 100]), make_sequence(0, 4, 100))
    assert placement == Placement(owners=((0, 0, 0, 1, 1, 1, 2, 2),))


def test_each_stage_has_pools_of_its_own() -> None:
    plan = make_plan([[2], [2]], 1)
    # stage 0: home 100, worker 0; stage 1: home 20, worker 100
    [placement] = assign(make_view(plan, [100, 20, 0, 100]), make_sequence(0, 4, 100))
    assert placement == Placement(owners=((0, 0), (2, 2)))


def test_staging_must_fit_at_home_even_if_workers_have_room() -> None:
    plan = make_plan([[4]], 1)
    sequence = make_sequence(0, 9, 1)  # three pages per lane, for ever
    assert assign(make_view(plan, [11, 1000]), sequence) == [None]
    assert assign(make_view(plan, [12, 1000]), sequence) == [Placement(owners=((1, 1, 1, 1),))]


def test_room_to_grow_is_asked_for_only_if_it_can_be_used() -> None:
    assert pages_of(make_sequence(0, 4, 1), PAGE_SIZE) == (1, 1)
    assert pages_of(make_sequence(0, 4, 2), PAGE_SIZE) == (1, 2)
    assert pages_of(make_sequence(0, 5, 4), PAGE_SIZE) == (2, 2)
    assert pages_of(make_sequence(0, 5, 500), PAGE_SIZE) == (2, 3)
    plan = make_plan([[4]])
    assert assign(make_view(plan, [7]), make_sequence(0, 4, 2)) == [None]
    assert assign(make_view(plan, [4]), make_sequence(0, 4, 1)) != [None]


def test_an_earlier_sequence_takes_its_pages_before_the_next_one() -> None:
    plan = make_plan([[2]])
    placements = assign(make_view(plan, [10]), *(make_sequence(arrival, 4, 9) for arrival in range(3)))
    assert [placement is not None for placement in placements] == [True, True, False]


def test_homes_keep_their_lanes_when_a_neighbour_needs_the_worker() -> None:
    """By free pages the first home would take the worker's only place, and the second one would find none."""
    plan = make_plan([[1, 1]], 1)
    [placement] = assign(make_view(plan, [2, 1, 3]), make_sequence(0, 4, 9))
    assert placement == Placement(owners=((0, 2),))


def fits(view: FleetView, placement: Placement, sequence: Sequence) -> bool:
    """Counts pages lane by lane."""
    now, later = pages_of(sequence, view.page_size)
    free = dict(view.free_pages)
    touched = set()
    for stage, owners in enumerate(placement.owners):
        for group, owner in enumerate(owners):
            pool, home = PoolId(owner, stage), PoolId(view.plan.home_ranks[stage][group], stage)
            free[pool] -= later
            if pool != home:
                free[home] -= now
            touched |= {pool, home}
    return all(free[pool] >= 0 for pool in touched)


def all_placements(plan: Plan) -> list[Placement]:
    per_stage = [product(*([home, *plan.worker_ranks] for home in homes)) for homes in plan.home_ranks]
    return [Placement(owners=owners) for owners in product(*per_stage)]


@given(
    st.sampled_from([[[3]], [[2, 1]], [[1, 1, 1]], [[2], [1, 1]], [[0, 2, 1]], [[1], [0, 1]]]),
    st.integers(0, 2),
    st.lists(st.integers(-2, 9), min_size=7, max_size=7),
    st.integers(1, 9),
    st.integers(1, 6),
)
@settings(max_examples=300)
def test_a_placement_is_found_exactly_when_there_is_one(
    groups: list[list[int]], num_workers: int, free: list[int], prompt_len: int, max_tokens: int
) -> None:
    plan = make_plan(groups, num_workers)
    view = make_view(plan, free[: len(pools_of(plan))])
    sequence = make_sequence(0, prompt_len, max_tokens)
    [placement] = assign(view, sequence)
    exists = any(fits(view, candidate, sequence) for candidate in all_placements(plan))
    assert (placement is not None) == exists
    if placement is not None:
        assert fits(view, placement, sequence)
        assert placement in all_placements(plan)


@given(st.sampled_from([[[3]], [[5, 3]], [[2], [1, 1]]]), st.lists(st.integers(1, 40), min_size=4, max_size=4))
@settings(max_examples=100)
def test_the_largest_context_is_exact(groups: list[list[int]], pages: list[int]) -> None:
    plan = make_plan(groups, 1)
    num_pages = {rank: pages[rank] for rank in plan.ranks}
    context = largest_context(plan, num_pages, PAGE_SIZE)
    view = make_view(plan, [num_pages[pool.rank] for pool in pools_of(plan)])
    if context:
        assert shortage_when_empty(context, plan, num_pages, PAGE_SIZE) is None
        assert assign(view, make_sequence(0, context, 1)) != [None]
    assert shortage_when_empty(context + 1, plan, num_pages, PAGE_SIZE) is not None
    assert assign(view, make_sequence(0, context + 1, 1)) == [None]


def test_a_prompt_that_can_never_fit_is_refused_with_numbers() -> None:
    shortage = shortage_when_empty(41, make_plan([[5, 3], [8]], 1), {0: 50, 1: 33, 2: 85, 3: 1000}, PAGE_SIZE)
    assert str(shortage) == "rank 0 lacks 5 pages for stage 0, rank 2 lacks 3 pages for stage 1"
