"""Comparison of two checkouts: figures in the output of scripts, oriented ratios, intervals, alternation."""

import json
import os
import sys
from math import comb
from pathlib import Path

import prove
import pytest
import records

FLEET_LINES = """
round 0  hetis          198.0 tokens/s  TPOT p95  128 ms  TTFT p95  10532 ms  512 steps  KV peak by rank [1, 2]
         shares measured 0.2 (1.0 s busy; asked 0.2)
round 1  hetis          200.0 tokens/s  TPOT p95  130 ms  TTFT p95  10530 ms  512 steps  KV peak by rank [1, 2]
round 0  with it         99.5 tokens/s  TPOT p95   12 ms  TTFT p95     53 ms  5 steps  KV peak by rank [1]
"""
STEP_LINES = """
at rest    150 steps   median   12.34 ms   95 %   20.00 ms
moving     160 steps   median   12.50 ms   95 %   21.00 ms
moving / at rest: median 1.013, 95 % 1.050 (aim 1.1); 12 lanes, 3 MiB, 4 MiB/s while they move
"""
SERVER_LINES = "    63.1 and 62.0 tokens/s\nround 0  chunk        54.7000\nround 0  watched      0.9912\n"
ENGINE_LINES = "round 0  hetis 1+0    {'first_token_s': 5.25, 'batch_tok_s': 82.5, 'single_tok_s': 22.0}\n"


def test_figures_are_read_from_the_output_of_scripts() -> None:
    found = prove.read_figures(prove.FLEET, FLEET_LINES)
    assert found["hetis tokens_per_s"] == 199.0
    assert found["with it ttft_p95_ms"] == 53.0
    assert len(found) == 6
    assert prove.read_figures(prove.STEPS, STEP_LINES) == {
        "at rest median_ms": 12.34, "at rest p95_ms": 20.0, "moving median_ms": 12.5, "moving p95_ms": 21.0,
    }  # fmt: skip
    assert prove.read_figures(prove.ENGINES, ENGINE_LINES) == {
        "hetis 1+0 first_token_s": 5.25, "hetis 1+0 batch_tokens_per_s": 82.5, "hetis 1+0 single_tokens_per_s": 22.0,
    }  # fmt: skip
    for name, figures in (("server-cost", {"chunk cost": 54.7}), ("server-share", {"watched share": 0.9912})):
        assert prove.read_figures(prove.BENCHMARKS[name].pattern, SERVER_LINES) == figures


def test_a_ratio_above_one_is_better_for_rates_and_for_times() -> None:
    assert prove.gain("watched share", 0.9, 0.99) == pytest.approx(1.1)
    assert prove.gain("chunk cost", 66.0, 60.0) == pytest.approx(1.1)
    assert prove.gain("hetis tokens_per_s", 100.0, 110.0) == pytest.approx(1.1)
    assert prove.gain("hetis tpot_p95_ms", 110.0, 100.0) == pytest.approx(1.1)
    assert prove.gain("hetis 1+0 first_token_s", 10.0, 20.0) == pytest.approx(0.5)


@pytest.mark.parametrize("count", [6, 7, 9, 15, 40])
def test_the_interval_is_the_narrowest_that_covers_the_median_often_enough(count: int) -> None:
    """The true median lies outside the k-th values iff fewer than k of `count` fair coins show heads, or tails."""

    def coverage(k: int) -> float:
        return 1 - 2 * sum(comb(count, heads) for heads in range(k)) / 2**count

    low, high = prove.sign_interval([float(value) for value in reversed(range(1, count + 1))])
    assert low + high == count + 1
    assert coverage(int(low)) >= 0.95 > coverage(int(low) + 1)


def test_few_values_give_all_there_is() -> None:
    assert prove.sign_interval([1.0]) == (1.0, 1.0)
    assert prove.sign_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


@pytest.mark.parametrize(("after", "is_ok"), [(1.0, True), (0.98, True), (0.9, False), (1.5, True)])
def test_worse_is_below_one_in_all_and_under_the_bound_in_the_middle(after: float, is_ok: bool) -> None:
    found = {"before": [{"x tokens_per_s": 1.0}] * 7, "after": [{"x tokens_per_s": after}] * 7}
    (line,), found_ok = prove.compare("name", found)
    assert found_ok == is_ok
    assert ("WORSE" in line) == (not is_ok)


def make_tree(path: Path, rate: float, log: Path) -> Path:
    """A checkout whose script prints one figure and logs its runs: checkout, entries of the folder, arguments."""
    (path / ".venv/bin").mkdir(parents=True)
    (path / ".venv/bin/python").symlink_to(sys.executable)
    (path / "bench").mkdir()
    (path / "bench/script.py").write_text(
        f"import os, sys\nopen({str(log)!r}, 'a').write(f'{path.name} {{len(os.listdir())}} {{sys.argv[1:]}}\\n')\n"
        f"assert os.path.samefile(os.environ[{records.FOLDER!r}], '.'), 'its rows would be kept'\n"
        f"print('speed {rate}')\n"
    )
    return path


def test_trees_alternate_and_every_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    trees = {"before": make_tree(tmp_path / "old", 2.0, log), "after": make_tree(tmp_path / "new", 3.0, log)}
    benchmark = prove.Benchmark("script.py", ("--a",), ("--short",), r"^(?P<case>speed) (?P<x_per_s>[\d.]+)")
    monkeypatch.setitem(prove.BENCHMARKS, "some", benchmark)
    kept: list[tuple[object, ...]] = []
    monkeypatch.setattr(prove, "keep", lambda *row: kept.append(row))
    found, holds = prove.prove("some", trees, 3)
    assert holds
    assert found == {"before": [{"speed x_per_s": 2.0}] * 3, "after": [{"speed x_per_s": 3.0}] * 3}
    order = [line.split()[0] for line in log.read_text().splitlines()]
    assert order == ["old", "new", "new", "old", "old", "new"]
    assert {line.partition(" ")[2] for line in log.read_text().splitlines()} == {"0 ['--a', '--short']"}
    assert [(row[2], row[3], row[5]) for row in kept][:2] == [
        ("before", 0, {"speed x_per_s": 2.0}), ("after", 0, {"speed x_per_s": 3.0}),
    ]  # fmt: skip


def test_a_row_is_one_line_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(records.FOLDER, str(tmp_path))
    monkeypatch.setattr(records, "commit", lambda tree: f"of {tree.name}")
    prove.keep("some", Path(os.sep) / "tree", "before", 4, 1.26, {"x": 2.0}, 0)
    (line,) = (tmp_path / "prove.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["date"] > "2026"
    assert row["machine"]
    assert (row["commit"], row["side"], row["benchmark"], row["alternation"]) == ("of tree", "before", "some", 4)
    assert (row["seconds"], row["exit_code"], row["figures"]) == (1.3, 0, {"x": 2.0})
