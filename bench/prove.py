"""Repeats all measurements of time and throughput; with --before, in alternation with another checkout of hetis.

    make prove                                        # this tree alone: figures, and whether they meet the aims
    make prove BEFORE=../hetis-before                 # seven alternations: is this tree as fast?
    python bench/prove.py --before ../hetis-before --only migration vllm --alternations 9

Both checkouts need `make install-bench` (an older one: matplotlib in its `.venv`). Each runs its own scripts with its
own Python, in an empty working directory. The order of the two alternates, so that a drift in the machine's speed
favours neither. Every run is appended to bench/results/prove.jsonl; what scripts append and draw themselves is dropped
(an older checkout may put it into its own bench/results).

The table shows the median ratio of each figure, oriented so that more than 1 is better, and a distribution-free
interval that covers the true median with at least 95 % (`sign_interval`). A figure is worse if its interval lies below
1 and its median is under 0.97; then, or if this tree alone misses an aim of its scripts, the exit code is 1.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from math import comb
from pathlib import Path
from statistics import median
from typing import NamedTuple

import records
from extras import need
from records import HERE

ENOUGH = 0.97
Figures = dict[str, float]


class Benchmark(NamedTuple):
    """A script with its arguments, those that make one run short, and a pattern for its output.

    Named groups of the pattern are metrics, except `case`, which names what was measured.
    """

    script: str
    arguments: tuple[str, ...]
    short: tuple[str, ...]
    pattern: str


FLEET = (
    r"^round \d+ +(?P<case>\S.*?) +(?P<tokens_per_s>[\d.]+) tokens/s +TPOT p95 +(?P<tpot_p95_ms>[\d.]+) ms +"
    r"TTFT p95 +(?P<ttft_p95_ms>[\d.]+) ms"
)
STEPS = r"^(?P<case>at rest|moving) +\d+ steps +median +(?P<median_ms>[\d.]+) ms +95 % +(?P<p95_ms>[\d.]+) ms"
ENGINES = (
    r"^round \d+ +(?P<case>\S.*?) +\{'first_token_s': (?P<first_token_s>[\d.]+), "
    r"'batch_tok_s': (?P<batch_tokens_per_s>[\d.]+), 'single_tok_s': (?P<single_tokens_per_s>[\d.]+)"
)
SERVER = r"^round \d+ +(?P<case>{cases}) +(?P<{metric}>[\d.]+)"
ONE_ROUND = ("--rounds", "1")
BENCHMARKS = {
    **{
        scenario: Benchmark("bench_fleet.py", ("--scenario", scenario), (*ONE_ROUND, "--dispatch", "hetis"), FLEET)
        for scenario in ("small-primary", "slow-worker", "slow-link", "throttled")
    },
    "migration": Benchmark("bench_migration.py", (), (), STEPS),
    "engine": Benchmark("bench_peers.py", (), ONE_ROUND, ENGINES),
    "server-cost": Benchmark(
        "bench_server.py", ("chunk", "idle"), ONE_ROUND, SERVER.format(cases="chunk|idle", metric="cost")
    ),
    "server-share": Benchmark(
        "bench_server.py",
        ("throughput", "watched", "overload"),
        ONE_ROUND,
        SERVER.format(cases="throughput|watched|overload", metric="share"),
    ),
}


# --- one run ----------------------------------------------------------------------------------------------------------


def run(tree: Path, benchmark: Benchmark, is_short: bool) -> tuple[Figures, int, str]:
    """Figures, exit code and output of one run of the tree's own script."""
    arguments = [*benchmark.arguments, *(benchmark.short if is_short else ())]
    command = [str(tree / ".venv/bin/python"), str(tree / "bench" / benchmark.script), *arguments]
    with tempfile.TemporaryDirectory(prefix="hetis-prove-") as empty:
        environment = os.environ | {records.FOLDER: empty}
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    return read_figures(benchmark.pattern, done.stdout), done.returncode, done.stdout + done.stderr


def read_figures(pattern: str, output: str) -> Figures:
    """`case metric` to value, the median over all lines of the case."""
    found: dict[str, list[float]] = {}
    for match in re.finditer(pattern, output, re.MULTILINE):
        groups = match.groupdict()
        case = groups.pop("case")
        for metric, value in groups.items():
            found.setdefault(f"{case} {metric}", []).append(float(value))
    return {figure: median(values) for figure, values in found.items()}


def keep(name: str, tree: Path, side: str, alternation: int, seconds: float, figures: Figures, code: int) -> None:
    """Appends a row to prove.jsonl."""
    row = {
        "date": records.date(), "machine": records.machine(), "commit": records.commit(tree), "side": side,
        "benchmark": name, "alternation": alternation, "seconds": round(seconds, 1), "exit_code": code,
        "figures": figures,
    }  # fmt: skip
    records.append("prove.jsonl", json.dumps(row).encode())


def prove(name: str, trees: dict[str, Path], alternations: int) -> tuple[dict[str, list[Figures]], bool]:
    """Figures of all alternations by side, and whether all runs met the aims of their script."""
    found: dict[str, list[Figures]] = {side: [] for side in trees}
    meets_aims = True
    for alternation in range(alternations):
        sides = list(trees) if alternation % 2 == 0 else list(trees)[::-1]
        for side in sides:
            begin = time.monotonic()
            figures, code, output = run(trees[side], BENCHMARKS[name], is_short=len(trees) > 1)
            if not figures:
                sys.exit(f"{name}, {side}: no figures (exit code {code}):\n{output[-4000:]}")
            keep(name, trees[side], side, alternation, time.monotonic() - begin, figures, code)
            print(f"{name} {alternation} {side}: {figures}", flush=True)
            meets_aims &= code == 0
            found[side].append(figures)
    return found, meets_aims


# --- all runs ---------------------------------------------------------------------------------------------------------


def gain(metric: str, before: float, after: float) -> float:
    """Ratio above 1 if `after` is better: rates and shares should be high, times and costs low."""
    return after / before if metric.endswith(("_per_s", "share")) else before / after


def sign_interval(values: Sequence[float], coverage: float = 0.95) -> tuple[float, float]:
    """Order statistics that enclose the true median with at least `coverage`, as far as the number of values allows.

    The number of values below the median is binomial with p = 1/2, so the interval from the k-th smallest to the k-th
    largest misses it with probability 2 P(B < k). Fewer than 6 values cannot reach 95 %: then it is their range.
    """
    ordered, count = sorted(values), len(values)
    k = 1
    while k < count // 2 and 2 * sum(comb(count, i) for i in range(k + 1)) / 2**count <= 1 - coverage:
        k += 1
    return ordered[k - 1], ordered[-k]


def compare(name: str, found: dict[str, list[Figures]]) -> tuple[list[str], bool]:
    """One line for each figure, and whether none is worse."""
    before, after = found["before"], found["after"]
    lines, is_ok = [], True
    for figure in after[0]:
        gains = [gain(figure, one[figure], other[figure]) for one, other in zip(before, after, strict=True)]
        low, high = sign_interval(gains)
        is_worse = high < 1 and median(gains) < ENOUGH
        is_ok &= not is_worse
        outcome = "WORSE" if is_worse else "ok"
        lines.append(f"{name:14} {figure:34} {median(gains):6.3f}  [{low:.3f}, {high:.3f}]  {outcome}")
    return lines, is_ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of hetis, installed")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--alternations", type=int, default=7, help="with --before (default: %(default)s)")
    options = parser.parse_args()
    need("matplotlib")
    trees = {"after": HERE} if options.before is None else {"before": options.before.resolve(), "after": HERE}
    for tree in trees.values():
        if not (tree / ".venv/bin/python").exists():
            sys.exit(f"{tree} is not an installed checkout of hetis: run `make install-bench` there.")
    is_ok, lines = True, []
    for name in options.only:
        if options.before is None:
            found, is_met = prove(name, trees, 1)
            table = [f"{name:14} {figure:34} {value:9.2f}" for figure, value in found["after"][0].items()]
            table.append(f"{name:14} aims: {'ok' if is_met else 'MISSED'}")
        else:  # one round per run is too few for the aims; only the trees are compared
            table, is_met = compare(name, prove(name, trees, options.alternations)[0])
        is_ok &= is_met
        lines += table
    print("\n" + "\n".join(lines))
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
