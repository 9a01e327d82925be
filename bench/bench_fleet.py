"""One workload on one emulated fleet under several policies: throughput, latencies, and counters of the policies.

    python bench/bench_fleet.py --scenario small-primary                      # 12 minutes: 4 policies, 3 rounds
    python bench/bench_fleet.py --scenario small-primary --dispatch hetis even --rounds 1
    python bench/bench_fleet.py --scenario slow-worker | slow-link | throttled
    python bench/bench_fleet.py --scenario small-primary --trace-file AzureLLMInferenceTrace_conv.csv
    python bench/bench_fleet.py --emulate fleet.json      # shares of a core, KV memory and links of your own:
        {"primary": {"kv_tokens": 4000}, "workers": [{"kv_tokens": 9000, "share": 0.3, "link": {"latency_ms": 2}}]}

Fleets are emulated with real processes on two cores (`emulation/`); scenarios, their arithmetic and their requirements
are in `fleet_scenarios.py`. Cases alternate, and all get the same requests at the same times. Prints a table of medians
over rounds, appends every run to bench/results/fleet.jsonl and draws the scenario as a picture beside it. Needs
matplotlib (`make install-bench`) and Linux.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from emulation.client import run_workload, warm_up
from emulation.fleet import Fleet
from emulation.launch import EmulatedFleet
from emulation.metrics import measure, sliding_rate
from emulation.workload import Request, make_requests, read_trace
from extras import need
from fleet_report import Counted, Row, check_requirements, draw, keep, table
from fleet_scenarios import POLICIES, SCENARIOS, Case, Scenario
from records import commit, date, machine

from hetis.core.config import EngineConfig
from hetis.core.messages import FleetStats

WINDOW_S = 2.0  # over which the picture's rate is taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=list(SCENARIOS), default="small-primary")
    parser.add_argument("--dispatch", nargs="+", help="only the cases with these policies")
    parser.add_argument("--emulate", type=Path, metavar="FILE", help="a fleet of your own, in place of the scenario's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trace-file", type=Path, help="lengths from an Azure trace, scaled like the drawn ones")
    options = parser.parse_args()
    need("matplotlib")
    scenario = SCENARIOS[options.scenario]
    if options.emulate is not None:
        scenario = with_fleet(scenario, msgspec.json.decode(options.emulate.read_bytes(), type=Fleet))
    trace = read_trace(options.trace_file) if options.trace_file is not None else []
    requests = make_requests(scenario.workload, scenario.model.vocab_size, trace)
    cases = [case for case in scenario.cases if options.dispatch is None or case.dispatch in options.dispatch]
    print(describe(requests, scenario), flush=True)
    rows: list[Row] = []
    for round_index in range(options.rounds):
        for case in cases:
            row = run_case(options.scenario, scenario, case, requests, round_index, options.trace_file)
            rows.append(row)
            keep(row)
            print(progress(row), flush=True)
    print("\n" + table(rows))
    results = check_requirements(scenario.requirements, rows)
    print("\n".join(sentence for sentence, _ in results))
    given = [path.stem for path in (options.emulate, options.trace_file) if path is not None]
    print(draw("_".join([options.scenario, *given]), scenario, rows))
    sys.exit(not all(is_met for _, is_met in results))


def with_fleet(scenario: Scenario, fleet: Fleet) -> Scenario:
    """The same load on another fleet under every policy, without requirements."""
    cases = tuple(Case(label=policy, fleet=fleet, dispatch=policy) for policy in POLICIES)
    return msgspec.structs.replace(scenario, cases=cases, requirements=())


def run_case(
    name: str, scenario: Scenario, case: Case, requests: Sequence[Request], round_index: int, trace_file: Path | None
) -> Row:
    with tempfile.TemporaryDirectory(prefix="hetis-bench-") as scratch:
        config = EngineConfig(
            model=str(scenario.model.write(Path(scratch))),
            load_format="dummy",
            device="cpu",
            dtype=scenario.model.dtype,
            max_num_seqs=scenario.max_num_seqs,
            max_num_batched_tokens=1024,
            dispatch=case.dispatch,
            profile_cache=False,  # ranks have equal keys, but different emulated speeds
        )
        with EmulatedFleet(case.fleet, config) as fleet:
            warm_up(fleet, scenario.max_num_seqs)
            timelines = run_workload(fleet, requests, case.throttles)
            counted = count(fleet.stats(), case.fleet, scenario)
            measured = fleet.measured()
    return Row(
        commit=commit(),
        date=date(),
        machine=machine(),
        scenario=name,
        case=case.label,
        round=round_index,
        dispatch=case.dispatch,
        fleet=case.fleet,
        throttles=case.throttles,
        model=scenario.model,
        max_num_seqs=scenario.max_num_seqs,
        workload=scenario.workload,
        trace=None if trace_file is None else trace_file.name,
        metrics=measure(timelines, scenario.window_s),
        counted=counted,
        measured=measured,
        rates=sliding_rate(timelines, WINDOW_S),
    )


def count(stats: FleetStats, fleet: Fleet, scenario: Scenario) -> Counted:
    return Counted(
        steps=stats.num_steps,
        preemptions=stats.num_preemptions,
        rebalances=stats.num_rebalances,
        reliefs=stats.num_reliefs,
        migrations=stats.num_migrations,
        migrated_mb=round(stats.migrated_bytes / 1e6, 1),
        kv_peak_tokens=[
            member.kv_tokens * counted.pages_peak // counted.pages_total
            for member, counted in zip(fleet.members, stats.members, strict=True)
        ],
    )


def describe(requests: Sequence[Request], scenario: Scenario) -> str:
    context = sum(len(request.token_ids) for request in requests) / len(requests)
    generated = sum(request.num_generated for request in requests) / len(requests)
    return (
        f"{machine()}; commit {commit()}\n"
        f"{len(requests)} requests in {requests[-1].arrival_s:.1f} s, on average {context:.0f} tokens in and "
        f"{generated:.0f} out; at most {scenario.max_num_seqs} at a time\n"
        f"{scenario.model.dtype}: weights {scenario.model.weight_bytes / 1e6:.0f} MB, "
        f"cache {scenario.model.kv_bytes_per_token / 1024:.0f} KiB a token"
    )


def progress(row: Row) -> str:
    """One run in two lines: its metrics, and the shares and delays that the emulation reached."""
    metrics, counted = row.metrics, row.counted
    shares = ", ".join(
        f"{measured.share:.4f} ({measured.busy_s:.1f} s busy; asked {member.share:.4f})"
        for member, measured in zip(row.fleet.members, row.measured, strict=True)
    )
    delays = "".join(
        f"; rank {rank} waited {one.delay_ms + one.late_ms:.2f} ms a message, {one.delay_ms:.2f} of them asked"
        for rank, one in enumerate(row.measured)
        if one.delay_ms
    )
    return (
        f"round {row.round}  {row.case:13} {metrics.tokens_per_s:6.1f} tokens/s  TPOT p95 {metrics.tpot_p95:4.0f} ms  "
        f"TTFT p95 {metrics.ttft_p95:6.0f} ms  {counted.steps} steps  KV peak by rank {counted.kv_peak_tokens}\n"
        f"         shares measured {shares}{delays}"
    )


if __name__ == "__main__":
    main()
