"""The min-max problem of `problem.py` as a mixed integer linear program, solved by HiGHS: slow, exact, to compare with.

Sets        sequences j = 0 .. J-1, devices i = 0 .. N-1
Parameters  G lanes per sequence; start_i, floor_i, lane_ij microseconds; pages_ij, free_i; most_i
Variables   x_ij   lanes of sequence j on device i        integer, 0 <= x_ij <= most_i
            y_i    whether device i gets any              0 or 1
            T      time of the slowest used device        T >= 0

Minimise T subject to
    placed   sum_i x_ij = G                                   for all j
    time     start_i y_i + sum_j lane_ij x_ij - T <= 0        for all i
    floor    floor_i y_i - T <= 0                             for all i
    used     x_ij - most_i y_i <= 0                           for all i, j
    memory   sum_j pages_ij x_ij <= free_i                    for all i

Columns are ordered x (device by device), y, T. Times are divided by the largest lane time, so that they are near 1.
"""

import logging
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetis.dispatcher.balance import balance, homeward
from hetis.dispatcher.problem import Counts, Problem

logger = logging.getLogger(__name__)

RELATIVE_GAP = 1e-4
TIME_LIMIT_S = 1.0  # the driver decides about several problems before it answers its ranks' hearts again
INFEASIBLE = 2  # scipy's status

Floats = NDArray[np.float64]


class Row(NamedTuple):
    """lower <= sum of value * column <= upper."""

    lower: float
    upper: float
    terms: dict[int, float]


class Solution(NamedTuple):
    counts: Counts
    bound_us: float  # no placement has a lower peak


def balance_by_highs(problem: Problem) -> Counts | None:
    """In place of `balance.balance`, which decides after all where HiGHS finds nothing in time."""
    if problem.num_sequences == 0:
        return [[] for _ in problem.start_us]
    try:
        solution = solve(problem)
    except TimeoutError as error:
        _warn_once(str(error))
        return balance(problem)
    return None if solution is None else homeward(problem, solution.counts)


@cache
def _warn_once(reason: str) -> None:
    logger.warning("%s; hetis' own solver decides, now and whenever that happens again", reason)


def solve(
    problem: Problem, *, relative_gap: float = RELATIVE_GAP, time_limit_s: float = TIME_LIMIT_S
) -> Solution | None:
    """A placement within `relative_gap` of the optimum, with the bound that proves it; None where nothing fits.

    When time runs out: the best placement found so far with its bound, or TimeoutError if there is none yet. So it is
    not for deciding alike on different machines.
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
    """HiGHS's answer, in scipy's words. scipy is only needed for `--dispatch highs` (`policies.check_solver`)."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    rows = [
        *placed(problem),
        *time(problem, scale_us),
        *floor(problem, scale_us),
        *used(problem),
        *memory(problem),
    ]
    num_columns = _t(problem) + 1
    most = [float(lanes) for lanes in problem.most_lanes for _ in range(problem.num_sequences)]
    matrix = csr_array(_compressed(rows), shape=(len(rows), num_columns))
    return milp(
        c=_floats([0.0] * (num_columns - 1) + [1.0]),
        integrality=_floats([1.0] * (num_columns - 1) + [0.0]),
        bounds=Bounds(0.0, _floats([*most, *[1.0] * problem.num_devices, np.inf])),
        constraints=LinearConstraint(matrix, _floats(row.lower for row in rows), _floats(row.upper for row in rows)),
        options=options,
    )


# --- rows -------------------------------------------------------------------------------------------------------------


def placed(problem: Problem) -> Iterable[Row]:
    for j in range(problem.num_sequences):
        terms = {_x(problem, device, j): 1.0 for device in range(problem.num_devices)}
        yield Row(problem.num_lanes, problem.num_lanes, terms)


def time(problem: Problem, scale_us: float) -> Iterable[Row]:
    for device, lane_us in enumerate(problem.lane_us):
        terms = {_x(problem, device, j): cost / scale_us for j, cost in enumerate(lane_us)}
        yield Row(-np.inf, 0.0, terms | {_y(problem, device): problem.start_us[device] / scale_us, _t(problem): -1.0})


def floor(problem: Problem, scale_us: float) -> Iterable[Row]:
    for device, floor_us in enumerate(problem.floor_us):
        if floor_us:
            yield Row(-np.inf, 0.0, {_y(problem, device): floor_us / scale_us, _t(problem): -1.0})


def used(problem: Problem) -> Iterable[Row]:
    for device, most in enumerate(problem.most_lanes):
        for j in range(problem.num_sequences):
            yield Row(-np.inf, 0.0, {_x(problem, device, j): 1.0, _y(problem, device): -float(most)})


def memory(problem: Problem) -> Iterable[Row]:
    for device, free in enumerate(problem.free_pages):
        pages = problem.pages(device)
        if sum(pages) * problem.most_lanes[device] > free:  # else it cannot bind
            yield Row(-np.inf, free, {_x(problem, device, j): float(count) for j, count in enumerate(pages) if count})


# --- columns ----------------------------------------------------------------------------------------------------------


def _x(problem: Problem, device: int, j: int) -> int:
    return device * problem.num_sequences + j


def _y(problem: Problem, device: int) -> int:
    return problem.num_devices * problem.num_sequences + device


def _t(problem: Problem) -> int:
    return problem.num_devices * (problem.num_sequences + 1)


def _compressed(rows: list[Row]) -> tuple[Floats, NDArray[np.int32], NDArray[np.int32]]:
    """Values, columns and row starts of a sparse matrix."""
    return (
        _floats(value for row in rows for value in row.terms.values()),
        np.array([column for row in rows for column in row.terms], dtype=np.int32),
        np.cumsum([0, *(len(row.terms) for row in rows)], dtype=np.int32),
    )


def _floats(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)
