"""Choice of timed calls, their number, and the times that count, with simulated timers."""

import pytest

from hetis.ranks.measuring.rounds import MAX_ROUNDS, MIN_POINTS, OVERHEAD_US, Call, Point, spread, time_points


class Machine:
    """Simulated machine, on which a call of size s takes (20 + s) * slowness microseconds."""

    def __init__(self, slowness: float = 1.0) -> None:
        self.slowness, self.spent_us, self.calls = slowness, 0.0, []

    def point(self, size: float) -> Point:
        def prepare() -> Call:
            return lambda: self.calls.append(size)

        return Point(size, prepare)

    def timer(self, call: Call) -> float:
        call()
        time_us = self.slowness * (20 + self.calls[-1])
        self.spent_us += time_us + OVERHEAD_US
        return time_us


SIZES = [10.0 * 2**k for k in range(16)]


def test_a_fast_machine_times_every_point_often() -> None:
    machine = Machine()
    times = time_points([machine.point(size) for size in SIZES], machine.timer, 100.0)
    assert times == pytest.approx([20 + size for size in SIZES])
    assert {machine.calls.count(size) for size in SIZES} == {2 + MAX_ROUNDS}
    order = machine.calls[2 * len(SIZES) :]
    assert order == SIZES[::-1] * MAX_ROUNDS, "largest first, in every round"


@pytest.mark.parametrize("slowness", [1.0, 5.0, 20.0, 100.0])
def test_the_budget_is_kept_and_a_slow_machine_still_gives_enough_points(slowness: float) -> None:
    machine, seconds = Machine(slowness), 0.5
    times = time_points([machine.point(size) for size in SIZES], machine.timer, seconds)
    assert MIN_POINTS <= len(times) <= len(SIZES)
    assert times == pytest.approx([slowness * (20 + size) for size in SIZES[: len(times)]])
    smallest = sum(2 * slowness * (20 + size) for size in SIZES[:MIN_POINTS])
    assert machine.spent_us <= max(1e6 * seconds, 2 * smallest)


def test_cheap_calls_are_timed_more_often_and_all_until_the_end() -> None:
    machine = Machine()
    time_points([machine.point(size) for size in SIZES], machine.timer, 4.0, max_rounds=40)
    counts = [machine.calls.count(size) for size in SIZES]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 42
    assert 2 < counts[-1] < 40
    last = [index for index, size in enumerate(machine.calls) if size == SIZES[-1]]
    assert last[-1] > 0.9 * len(machine.calls), "expensive calls are timed until the end"


def test_disturbed_calls_do_not_count() -> None:
    """Half of all calls take ten times as long."""
    machine = Machine()
    disturbed = 0

    def timer(call: Call) -> float:
        nonlocal disturbed
        disturbed += 1
        return machine.timer(call) * (10 if disturbed % 2 else 1)

    times = time_points([machine.point(size) for size in SIZES[:9]], timer, 100.0)
    assert times == pytest.approx([20 + size for size in SIZES[:9]])


def test_ranks_whose_timers_agree_make_the_same_calls() -> None:
    one, other = Machine(7.0), Machine(7.0)
    for machine in (one, other):
        time_points([machine.point(size) for size in SIZES], machine.timer, 0.3)
    assert one.calls == other.calls


def test_sizes_are_spread_in_equal_ratios() -> None:
    assert spread(1, 2048, 12) == [2**k for k in range(12)]
    assert spread(16, 16, 3) == [16, 16, 16]
    assert spread(16, 1, 2) == [16, 16]
    assert spread(1, 4, 5) == [1, 1, 2, 3, 4]
