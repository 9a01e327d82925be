"""Cost of migration to the steps that transfer pages, measured within one run.

    python bench/bench_migration.py [--plan 1+2] [--sequences 16] [--context 512] [--lanes 4] [--stretch 12]

A fleet of CPU ranks with random weights decodes a fixed batch. Stretches of 12 steps without migration alternate with
stretches in which `--lanes` lanes migrate all the time, to random targets. The fleet's trace has the duration of each
step of the primary and its number of transferred pages. Prints median and 95th percentile of steps with and without
pages, their ratios, and the transfer rate. Exit code 1 if the ratio of the 95th percentiles exceeds the aim.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from checkpoint import CONFIG

from hetis import LLM, SamplingParams
from hetis.core.messages import FleetStats

STRETCH = 12  # steps; in longer stretches drifts of the machine's speed dominate the 95th percentile
SHAPE = CONFIG | {"num_hidden_layers": 12, "vocab_size": 32000}
AIM = 1.10  # of the 95th percentile


def run(options: argparse.Namespace, directory: Path) -> tuple[list[dict[str, Any]], FleetStats]:
    """Events of the trace, and the fleet's statistics."""
    (directory / "config.json").write_text(json.dumps(SHAPE))
    trace = directory / "trace.json"
    os.environ["HETIS_RANDOM_MIGRATION"] = f"{options.stretch},{options.stretch},{options.lanes}"
    os.environ["PYTHONPATH"] = str(Path(__file__).parent / "random_migration")
    with LLM(
        directory,
        plan=options.plan,
        device="cpu",
        load_format="dummy",
        dispatch="hetis",
        theta=1e9,  # no rebalancing: only the random migrations
        kv_cache_memory="1GiB",
        max_model_len=options.context + options.steps + 1,
        trace=str(trace),
    ) as llm:
        prompts = [[7 + index] * options.context for index in range(options.sequences)]
        params = SamplingParams(max_tokens=options.steps, temperature=0, ignore_eos=True, detokenize=False)
        llm.generate(prompts, params)
        stats = llm.fleet_stats()
    events: list[dict[str, Any]] = json.loads(trace.read_text())
    return events, stats


def durations_ms(events: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Durations of the primary's decode steps: (without, with page transfers)."""
    steps = [event for event in events if event["name"].startswith("step") and event["pid"] == 0]
    decodes = [step for step in steps if not step["args"]["prompt_tokens"]]
    rest, moving = (
        [step["dur"] / 1e3 for step in decodes if bool(step["args"]["page_layers"]) == carries]
        for carries in (False, True)
    )
    return rest, moving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="1+2")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of each sequence")
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--lanes", type=int, default=4, help="migrating at a time")
    parser.add_argument("--stretch", type=int, default=STRETCH, help="steps with, or without, migration")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        events, stats = run(options, Path(directory))
    kinds = dict(zip(("at rest", "moving"), durations_ms(events), strict=True))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {options}")
    found = {name: (median(times), quantiles(times, n=20)[-1]) for name, times in kinds.items()}
    for name, (middle, high) in found.items():
        print(f"{name:8} {len(kinds[name]):5} steps   median {middle:7.2f} ms   95 % {high:7.2f} ms")
    ratios = [moving / rest for moving, rest in zip(found["moving"], found["at rest"], strict=True)]
    seconds = sum(kinds["moving"]) / 1e3
    print(
        f"moving / at rest: median {ratios[0]:.3f}, 95 % {ratios[1]:.3f} (aim {AIM}); {stats.num_migrations} lanes, "
        f"{stats.migrated_bytes / 2**20:.0f} MiB, {stats.migrated_bytes / 2**20 / seconds:.0f} MiB/s while they move"
    )
    sys.exit(ratios[1] > AIM)


if __name__ == "__main__":
    main()
