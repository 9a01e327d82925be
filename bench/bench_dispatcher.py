"""Host time and quality of the placement solvers on random problems: the C++ solver, plain insertion, and HiGHS.

    python bench/bench_dispatcher.py [--count 60] [--seed 0] [--no-highs]

Claims for the C++ solver, arguments converted and all: at most 200 us for 8 new sequences on 8 devices and 5 ms for 64
on 64; the optimum for one sequence, within 2 % of it for several, by HiGHS's lower bound. Insertion decides where no
C++ library is built. Each problem is solved five times and the fastest time counts, so that a busy machine does not
show.
"""

import argparse
import time
from random import Random
from statistics import mean, median, quantiles
from typing import NamedTuple

from extras import need

from hetis.dispatcher import native
from hetis.dispatcher.insertion import InsertionSolver
from hetis.dispatcher.problem import Problem, makespan_us
from hetis.dispatcher.solver import Solver
from tests.dispatcher.random_problems import random_problem

SIZES = ((1, 8), (2, 8), (4, 8), (8, 8), (16, 16), (64, 64))  # sequences, devices
HIGHS_LIMIT = 100  # sequences x devices beyond which HiGHS is not asked: it would take minutes
REPEATS = 5


class Bounds(NamedTuple):
    """HiGHS's answers for some problems."""

    bounds_us: list[float | None]  # None: nothing fits
    median_ms: float


def fastest_us(solver: Solver, problem: Problem) -> float:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        solver.solve(problem)
        times.append((time.perf_counter() - begin) * 1e6)
    return min(times)


def spread_us(solver: Solver, problems: list[Problem]) -> str:
    """Median, 90th percentile and maximum of the host time."""
    times = [fastest_us(solver, problem) for problem in problems]
    return f"{median(times):7.0f} {quantiles(times, n=10)[-1]:7.0f} {max(times):7.0f}"


def ask_highs(problems: list[Problem]) -> Bounds:
    from tests.dispatcher.highs import solve_exactly

    bounds_us, times_ms = [], []
    for problem in problems:
        begin = time.perf_counter()
        solution = solve_exactly(problem, relative_gap=1e-3, time_limit_s=5.0)
        times_ms.append((time.perf_counter() - begin) * 1e3)
        bounds_us.append(None if solution is None else solution.bound_us)
    return Bounds(bounds_us, median(times_ms))


def gaps(solver: Solver, problems: list[Problem], bounds_us: list[float | None]) -> str:
    """Mean and largest distance to the bound, and problems that only HiGHS found a placement for."""
    found, num_missed = [], 0
    for problem, bound_us in zip(problems, bounds_us, strict=True):
        counts = solver.solve(problem)
        if counts is not None and bound_us is not None:
            found.append(makespan_us(problem, counts) / bound_us - 1)
        num_missed += counts is None and bound_us is not None
    return f"{mean(found):7.2%} {max(found):7.2%} {num_missed:6}"


def measure(num_sequences: int, num_devices: int, count: int, rng: Random, with_highs: bool) -> None:
    problems = [random_problem(rng, num_sequences, num_devices) for _ in range(count)]
    is_asked = with_highs and num_sequences * num_devices <= HIGHS_LIMIT
    highs = ask_highs(problems) if is_asked else None
    for name, solver in (("C++", native.load()), ("insertion", InsertionSolver())):
        line = f"{num_sequences:9} {num_devices:7}  {name:9} {spread_us(solver, problems)}"
        if highs is not None:
            line += f"  {gaps(solver, problems, highs.bounds_us)}  {highs.median_ms:8.1f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="problems of each size (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random problems (default 0)")
    parser.add_argument("--no-highs", action="store_true", help="do not compare with HiGHS")
    arguments = parser.parse_args()
    if not arguments.no_highs:
        need("scipy")
    rng = Random(arguments.seed)
    print("                                    host time, us              gap to HiGHS        HiGHS,")
    print("sequences devices  solver     median    90 % slowest     mean largest missed        ms")
    for num_sequences, num_devices in SIZES:
        measure(num_sequences, num_devices, arguments.count, rng, not arguments.no_highs)


if __name__ == "__main__":
    main()
