"""Host time and quality of the min-max solver, against HiGHS on the same problems.

    python bench/bench_dispatcher.py [--count 60] [--seed 0] [--no-highs]

Aims: at most 200 us for 8 new sequences on 8 devices and 5 ms for 64 on 64, in the median over random fleets, models
and loads (`dispatch_problems.py`); exact for one sequence, within 2 % of the optimum for several. Each problem is
solved five times and its fastest time counts, so that a busy machine does not show. HiGHS needs scipy.
"""

import argparse
import time
from collections.abc import Callable
from random import Random
from statistics import mean, median, quantiles

from dispatch_problems import random_problem

from hetis.dispatcher.balance import balance
from hetis.dispatcher.milp import solve
from hetis.dispatcher.problem import Problem, peak_us

SIZES = ((1, 8), (2, 8), (4, 8), (8, 8), (16, 16), (64, 64))  # sequences, devices
HIGHS_LIMIT = 100  # lanes kinds x devices beyond which HiGHS is not asked: it would take minutes
REPEATS = 5


def fastest_us(solver: Callable[[Problem], object], problem: Problem) -> float:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        solver(problem)
        times.append((time.perf_counter() - begin) * 1e6)
    return min(times)


def compare(problems: list[Problem]) -> str:
    """Distance to HiGHS's bound, and its time."""
    gaps, times = [], []
    for problem in problems:
        begin = time.perf_counter()
        solution = solve(problem, relative_gap=1e-3, time_limit_s=5.0)
        times.append((time.perf_counter() - begin) * 1e3)
        counts = balance(problem)
        assert (counts is None) == (solution is None), "one of the two finds a placement and the other does not"
        if counts is not None and solution is not None:
            gaps.append(peak_us(problem, counts) / solution.bound_us - 1)
    return f"{mean(gaps):7.2%} {max(gaps):7.2%} {median(times):9.1f}"


def measure(num_sequences: int, num_devices: int, count: int, rng: Random, with_highs: bool) -> str:
    problems = [random_problem(rng, num_sequences, num_devices) for _ in range(count)]
    times = [fastest_us(balance, problem) for problem in problems]
    row = f"{num_sequences:9} {num_devices:7} {median(times):9.0f} {quantiles(times, n=10)[-1]:9.0f} {max(times):9.0f}"
    if with_highs and num_sequences * num_devices <= HIGHS_LIMIT:
        row += "  " + compare(problems)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="problems of each size (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random problems (default 0)")
    parser.add_argument("--no-highs", action="store_true", help="do not compare with HiGHS")
    arguments = parser.parse_args()
    rng = Random(arguments.seed)
    print("sequences devices    median      90 %   slowest  mean and largest gap, HiGHS")
    print("                         us        us        us        %       %        ms")
    for num_sequences, num_devices in SIZES:
        print(measure(num_sequences, num_devices, arguments.count, rng, not arguments.no_highs), flush=True)


if __name__ == "__main__":
    main()
