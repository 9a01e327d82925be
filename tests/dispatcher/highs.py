"""Oracle: the placement problem (`problem.py`) as a mixed integer linear program, solved by HiGHS. Exact, and slow.

Sets        sequences j = 0 .. J-1, devices i = 0 .. N-1
Parameters  G lanes per sequence; start_i, floor_i, lane_ij microseconds; pages_ij, free_i; most_i
Variables   x_ij   lanes of sequence j on device i        integer, 0 <= x_ij <= most_i
            y_i    whether device i gets any              0 or 1
            T      makespan                               T >= 0

Minimise T subject to
    placed   sum_i x_ij = G                                   for all j
    time     start_i y_i + sum_j lane_ij x_ij - T <= 0        for all i
    floor    floor_i y_i - T <= 0                             for all i
    used     x_ij - most_i y_i <= 0                           for all i, j
    memory   sum_j pages_ij x_ij <= free_i                    for all i

Columns are ordered x (device by device), y, T. Times are divided by the largest lane time, so that they are near 1.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from hetis.dispatcher.problem import Counts, Problem

INFEASIBLE = 2  # scipy's status

Floats = NDArray[np.float64]


class Constraint(NamedTuple):
    """lower <= sum of value * column <= upper."""

    lower: float
    upper: float
    terms: dict[int, float]


class Solution(NamedTuple):
    counts: Counts
    bound_us: float  # no placement has a smaller makespan


def solve_exactly(problem: Problem, *, relative_gap: float = 1e-4, time_limit_s: float = 10.0) -> Solution | None:
    """A placement within `relative_gap` of the optimum, with the bound that proves it; None where nothing fits.

    When time runs out: the best placement found so far with its bound, or TimeoutError if there is none yet.
    """
    scale_us = max(max(lane_us) for lane_us in problem.lane_us)
    result = _run(problem, scale_us, {"mip_rel_gap": relative_gap, "time_limit": time_limit_s})
    if result.status == INFEASIBLE:
        return None
    if result.x is None:
        raise TimeoutError(f"HiGHS found no placement within {time_limit_s} s")
    values = np.rint(result.x[: _y(problem, 0)]).astype(int).reshape(problem.num_devices, problem.num_sequences)
    return Solution(values.tolist(), result.mip_dual_bound * scale_us)


def _run(problem: Problem, scale_us: float, options: dict[str, float]) -> Any:
    """The result of `scipy.optimize.milp`."""
    constraints = [
        *placed(problem),
        *time(problem, scale_us),
        *floor(problem, scale_us),
        *used(problem),
        *memory(problem),
    ]
    num_columns = _t(problem) + 1
    most = [float(lanes) for lanes in problem.most_lanes for _ in range(problem.num_sequences)]
    matrix = csr_array(_compressed(constraints), shape=(len(constraints), num_columns))
    lower, upper = (_floats(limits) for limits in zip(*((one.lower, one.upper) for one in constraints), strict=True))
    return milp(
        c=_floats([0.0] * (num_columns - 1) + [1.0]),
        integrality=_floats([1.0] * (num_columns - 1) + [0.0]),
        bounds=Bounds(0.0, _floats([*most, *[1.0] * problem.num_devices, np.inf])),
        constraints=LinearConstraint(matrix, lower, upper),
        options=options,
    )


# --- constraints ------------------------------------------------------------------------------------------------------


def placed(problem: Problem) -> Iterable[Constraint]:
    for j in range(problem.num_sequences):
        terms = {_x(problem, device, j): 1.0 for device in range(problem.num_devices)}
        yield Constraint(problem.num_lanes, problem.num_lanes, terms)


def time(problem: Problem, scale_us: float) -> Iterable[Constraint]:
    for device, lane_us in enumerate(problem.lane_us):
        terms = {_x(problem, device, j): cost / scale_us for j, cost in enumerate(lane_us)}
        terms |= {_y(problem, device): problem.start_us[device] / scale_us, _t(problem): -1.0}
        yield Constraint(-np.inf, 0.0, terms)


def floor(problem: Problem, scale_us: float) -> Iterable[Constraint]:
    for device, floor_us in enumerate(problem.floor_us):
        if floor_us:
            yield Constraint(-np.inf, 0.0, {_y(problem, device): floor_us / scale_us, _t(problem): -1.0})


def used(problem: Problem) -> Iterable[Constraint]:
    for device, most in enumerate(problem.most_lanes):
        for j in range(problem.num_sequences):
            yield Constraint(-np.inf, 0.0, {_x(problem, device, j): 1.0, _y(problem, device): -float(most)})


def memory(problem: Problem) -> Iterable[Constraint]:
    for device, free in enumerate(problem.free_pages):
        pages = problem.pages(device)
        if sum(pages) * problem.most_lanes[device] > free:  # else it cannot bind
            terms = {_x(problem, device, j): float(count) for j, count in enumerate(pages) if count}
            yield Constraint(-np.inf, free, terms)


# --- columns ----------------------------------------------------------------------------------------------------------


def _x(problem: Problem, device: int, j: int) -> int:
    return device * problem.num_sequences + j


def _y(problem: Problem, device: int) -> int:
    return problem.num_devices * problem.num_sequences + device


def _t(problem: Problem) -> int:
    return problem.num_devices * (problem.num_sequences + 1)


def _compressed(constraints: list[Constraint]) -> tuple[Floats, NDArray[np.int32], NDArray[np.int32]]:
    """Values, columns and starts of a sparse matrix with a constraint per line."""
    return (
        _floats(value for one in constraints for value in one.terms.values()),
        np.array([column for one in constraints for column in one.terms], dtype=np.int32),
        np.cumsum([0, *(len(one.terms) for one in constraints)], dtype=np.int32),
    )


def _floats(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)
