"""Output of `bench_fleet.py`: rows, a table, a picture."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import records
from emulation.client import Throttle
from emulation.fleet import Fleet
from emulation.launch import Measured
from emulation.metrics import Metrics
from emulation.model import ModelShape
from emulation.workload import Workload
from fleet_scenarios import Requirement, Scenario


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of the fleet after one run."""

    steps: int
    preemptions: int
    rebalances: int
    reliefs: int
    migrations: int  # lanes
    migrated_mb: float
    kv_peak_tokens: list[int]  # by rank, of whole sequences


class Row(msgspec.Struct, kw_only=True):
    """One run."""

    commit: str
    date: str
    machine: str
    scenario: str
    case: str
    round: int
    dispatch: str
    fleet: Fleet
    throttles: tuple[Throttle, ...]
    model: ModelShape
    max_num_seqs: int
    workload: Workload
    trace: str | None  # name of the file that gave the lengths
    metrics: Metrics
    counted: Counted
    measured: list[Measured]  # shares and delays that the emulation reached, by rank
    rates: list[tuple[float, float]]  # (second, output tokens/s in the two seconds before)


def keep(row: Row) -> None:
    """Appends the row to fleet.jsonl."""
    records.append("fleet.jsonl", msgspec.json.encode(row))


COLUMNS = ("tokens_per_s", "ttft_p50", "ttft_p95", "tpot_p50", "tpot_p95", "kv_peak", "window_tokens_per_s")


def medians(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Medians over rounds, by case and metric, in order of first appearance."""
    found: dict[str, dict[str, float]] = {}
    for case in dict.fromkeys(row.case for row in rows):
        runs = [msgspec.structs.asdict(row.metrics) for row in rows if row.case == case]
        found[case] = {column: statistics.median(run[column] for run in runs) for column in COLUMNS}
    return found


def table(rows: Sequence[Row]) -> str:
    """Medians over rounds; counts are those of the last round."""
    found = medians(rows)
    first = next(iter(found.values()))
    lines = [
        f"{'':14} {'tokens/s':>9} {'ratio':>6} {'TTFT p50':>9} {'p95 ms':>7} {'TPOT p50':>9} {'p95 ms':>7} "
        f"{'KV peak':>8} {'preempted':>9} {'rebalances':>10} {'lanes moved':>11} {'MB':>6}"
    ]
    for case, row in found.items():
        counted = [one for one in rows if one.case == case][-1].counted
        lines.append(
            f"{case:14} {row['tokens_per_s']:9.1f} {row['tokens_per_s'] / first['tokens_per_s']:6.2f} "
            f"{row['ttft_p50']:9.0f} {row['ttft_p95']:7.0f} {row['tpot_p50']:9.0f} {row['tpot_p95']:7.0f} "
            f"{row['kv_peak']:8.0f} {counted.preemptions:9} {counted.rebalances + counted.reliefs:10} "
            f"{counted.migrations:11} {counted.migrated_mb:6.0f}"
        )
    return "\n".join(lines)


def check_requirements(requirements: Iterable[Requirement], rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """(sentence, whether it is met) for each requirement whose cases ran."""
    found, results = medians(rows), []
    for rule in requirements:
        if rule.of in found and rule.over in found:
            ratio = found[rule.of][rule.metric] / found[rule.over][rule.metric]
            wanted = f"at {'least' if rule.at_least else 'most'} {rule.bound:g}"
            outcome = "ok" if rule.holds(ratio) else "MISSED"
            sentence = f"{rule.metric}: {rule.of} / {rule.over} = {ratio:.2f}, wanted {wanted}: {outcome}"
            results.append((sentence, rule.holds(ratio)))
    return results


def draw(name: str, scenario: Scenario, rows: Sequence[Row]) -> Path:
    """Bars of medians with a dot per round, and output tokens/s over time in the last round; returns the file."""
    from matplotlib import pyplot

    found = medians(rows)
    figure, axes = pyplot.subplots(1, 4, figsize=(17, 4), width_ratios=[1, 1, 1, 2])
    for axis, metric, title in zip(
        axes,
        ("tokens_per_s", "ttft_p95", "tpot_p95"),
        ("output tokens/s", "TTFT p95, ms", "TPOT p95, ms"),
        strict=False,
    ):
        axis.bar(list(found), [row[metric] for row in found.values()], color="#8fb4d9")
        for row in rows:
            axis.plot(row.case, msgspec.structs.asdict(row.metrics)[metric], "k.")
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=25)
    for case in found:
        rates = [row for row in rows if row.case == case][-1].rates
        axes[3].plot([at for at, _ in rates], [rate for _, rate in rates], label=case)
    for throttle in (throttle for case in scenario.cases for throttle in case.throttles):
        axes[3].axvline(throttle.at_s, color="grey", linestyle=":")
    axes[3].set_title("output tokens/s over time, s (window of 2 s, last round)")
    axes[3].legend()
    figure.suptitle(f"{name}: medians of {len({row.round for row in rows})} rounds, {rows[0].machine}")
    figure.tight_layout()
    path = records.folder() / f"fleet_{name}.png"
    figure.savefig(path, dpi=80)
    return path
