"""Host time and quality of the min-max solver, in C++ and in Python, against HiGHS on the same problems.

    python bench/bench_dispatcher.py [--count 60] [--seed 0] [--no-highs]

Aims: at most 200 us for 8 new sequences on 8 devices and 5 ms for 64 on 64, for every one of many random fleets,
models and loads (`random_problems.py` of the tests), arguments converted and all; exact for one sequence, within 2 %
of the optimum for several. Each problem is solved five times and its fastest time counts, so that a busy machine does
not show. Both give the same placements. HiGHS needs scipy, the first three columns the C++ solver.
"""

import argparse
import time
from collections.abc import Callable
from random import Random
from statistics import mean, median, quantiles

from extras import need

from hetis.dispatcher import native
from hetis.dispatcher.balance import balance_ref
from hetis.dispatcher.milp import solve
from hetis.dispatcher.problem import Counts, Problem, peak_us
from tests.dispatcher.random_problems import random_problem

SIZES = ((1, 8), (2, 8), (4, 8), (8, 8), (16, 16), (64, 64))  # sequences, devices
HIGHS_LIMIT = 100  # lanes kinds x devices beyond which HiGHS is not asked: it would take minutes
REPEATS = 5

Solver = Callable[[Problem], Counts | None]


def fastest_us(solver: Solver, problem: Problem) -> float:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        solver(problem)
        times.append((time.perf_counter() - begin) * 1e6)
    return min(times)


def spread_us(solver: Solver, problems: list[Problem]) -> str:
    """Median, 90th percentile and slowest."""
    times = [fastest_us(solver, problem) for problem in problems]
    return f"{median(times):7.0f} {quantiles(times, n=10)[-1]:7.0f} {max(times):7.0f}"


def compare(problems: list[Problem]) -> str:
    """Distance to HiGHS's bound, and its time."""
    gaps, times = [], []
    for problem in problems:
        begin = time.perf_counter()
        solution = solve(problem, relative_gap=1e-3, time_limit_s=5.0)
        times.append((time.perf_counter() - begin) * 1e3)
        counts = balance_ref(problem)
        assert (counts is None) == (solution is None), "one of the two finds a placement and the other does not"
        if counts is not None and solution is not None:
            gaps.append(peak_us(problem, counts) / solution.bound_us - 1)
    return f"{mean(gaps):7.2%} {max(gaps):7.2%} {median(times):8.1f}"


def measure(num_sequences: int, num_devices: int, count: int, rng: Random, with_highs: bool) -> str:
    problems = [random_problem(rng, num_sequences, num_devices) for _ in range(count)]
    library = native.load()
    in_cpp = f"{'not built':>23}" if library is None else spread_us(library.balance, problems)
    row = f"{num_sequences:9} {num_devices:7}  {in_cpp}  {spread_us(balance_ref, problems)}"
    if with_highs and num_sequences * num_devices <= HIGHS_LIMIT:
        row += "  " + compare(problems)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="problems of each size (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random problems (default 0)")
    parser.add_argument("--no-highs", action="store_true", help="do not compare with HiGHS")
    arguments = parser.parse_args()
    if not arguments.no_highs:
        need("scipy")
    rng = Random(arguments.seed)
    print("                   C++, us                  Python, us               gap to HiGHS    HiGHS,")
    print("sequences devices   median    90 % slowest   median    90 % slowest     mean largest       ms")
    for num_sequences, num_devices in SIZES:
        print(measure(num_sequences, num_devices, arguments.count, rng, not arguments.no_highs), flush=True)


if __name__ == "__main__":
    main()
