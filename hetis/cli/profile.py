"""`hetis profile`: starts the fleet, measures every device and link, shows the result and writes it to a file."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hetis.cli.arguments import add_engine_arguments, engine_config
from hetis.core.files import check_writable, write_file
from hetis.core.messages import ProfileQuery, ProfileReport
from hetis.core.model_spec import DTYPE_BYTES, ModelSpec, resolve_dtype
from hetis.core.plan import Plan
from hetis.core.profile import FleetProfile, TransferProfile
from hetis.core.sizes import format_bytes
from hetis.cost.footprint import layer_weights
from hetis.frontend.console import new_table, render, write

if TYPE_CHECKING:
    from rich.table import Table

TOKENS = (1, 64, 1024)  # step sizes for which a layer's time is shown
MEBI = 1 << 20
NAME_WIDTH = 30
OUTPUT = "--output"
EXAMPLES = """examples:
  hetis profile ./model --plan 1+2 --output fleet.json
  hetis generate ./model --plan 1+2 --profile fleet.json --prompt "Once upon a time"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `hetis profile`."""
    group = parser.add_argument_group("result")
    group.add_argument(OUTPUT, type=Path, metavar="FILE", help="write the profile to FILE, for --profile")
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures the fleet, writes the profile to the user's file, and shows it on standard output."""
    from hetis.frontend.client import EngineClient
    from hetis.launch.checks import plan_for

    if options.output is not None:
        check_writable(options.output, OUTPUT, (options.plan, options.profile, options.trace))  # before measuring
    config = engine_config(options)
    _, spec, plan = plan_for(config)
    client = EngineClient(config, measure=True)
    try:
        client.wait_until_ready()
        report = client.ask(ProfileQuery(), ProfileReport)
    finally:
        client.close()
    assert report.profile is not None
    profile, dtype = report.profile, resolve_dtype(config.dtype, spec)
    if options.output is not None:  # before anything else can fail
        write_file(options.output, msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n", OUTPUT)
    parts = [f"{render(title, table)}\n" for title, table in tables(profile, report, spec, plan, dtype)]
    if options.output is not None:
        parts.append(f"written to {options.output}")
    write("\n".join(parts) + "\n")


def tables(
    profile: FleetProfile, report: ProfileReport, spec: ModelSpec, plan: Plan, dtype: str
) -> "Iterator[tuple[str, Table]]":
    """(title, table), where the title gives the meaning of the columns."""
    yield (
        "Devices. memory: read bandwidth; usable: for weights and KV cache; from: source of the figures.",
        devices_table(profile, report, plan),
    )
    yield (
        "Attention of one layer over the KV cache: the larger of `least` and `fixed` + `per head` x query heads\n"
        "+ `per MiB` x MiB of cache read. accuracy: of this formula, on measurements left out of its fit.",
        attention_table(profile),
    )
    yield (
        "Non-attention time of one layer on primaries, for steps of 1, 64 and 1024 tokens; prompts: attention of\n"
        "prefill, per query head and pair of tokens.",
        layers_table(profile, spec, plan, dtype),
    )
    if profile.links:
        yield (
            "Links between ranks. latency: of the smallest message; rate: of each further byte.",
            links_table(profile),
        )


def devices_table(profile: FleetProfile, report: ProfileReport, plan: Plan) -> "Table":
    """Device, memory and source of the figures of every rank."""
    table = new_table(("rank", "role", "device", "name"), ("memory", "usable"))
    table.add_column("from", no_wrap=True)
    for member in plan.members:
        device = profile.devices[member.rank]
        name = device.key.device if len(device.key.device) <= NAME_WIDTH else device.key.device[: NAME_WIDTH - 1] + "…"
        reads, usable = _gigabytes(device.read_bytes_per_us), format_bytes(device.usable_bytes)
        role, where = plan.role_of(member.rank), report.devices.get(member.rank, member.device)
        table.add_row(str(member.rank), role, where, name, reads, usable, report.sources[member.rank])
    return table


def attention_table(profile: FleetProfile) -> "Table":
    """Fitted terms of decode attention of every rank."""
    table = new_table(("rank",), ("per head", "per MiB", "fixed", "least", "accuracy"))
    for rank, device in profile.devices.items():
        found = device.attention
        terms = (found.us_per_head, found.us_per_byte * MEBI, found.constant_us, found.floor_us)
        table.add_row(str(rank), *(_microseconds(term) for term in terms), f"{found.accuracy:.1%}")
    return table


def layers_table(profile: FleetProfile, spec: ModelSpec, plan: Plan, dtype: str) -> "Table":
    """Non-attention time and prefill of the primaries."""
    titles = [f"{tokens} token{'s' if tokens > 1 else ''}" for tokens in TOKENS]
    table = new_table(("rank",), (*titles, "accuracy", "prompts", "accuracy"))
    for primary in plan.primaries:
        layer, weights = profile.devices[primary.rank].layer, layer_weights(spec, plan, primary)
        assert layer is not None, f"rank {primary.rank} is a primary without a profile of its layers"
        times = [layer.dense.time_us(weights * DTYPE_BYTES[dtype], 2 * weights * tokens) for tokens in TOKENS]
        prompts = layer.prefill
        table.add_row(
            str(primary.rank),
            *(f"{time_us:.0f} us" for time_us in times),
            f"{layer.dense.accuracy:.1%}",
            *(("-", "-") if prompts is None else (f"{1e3 * prompts.us_per_pair:.3g} ns", f"{prompts.accuracy:.1%}")),
        )
    return table


def links_table(profile: FleetProfile) -> "Table":
    """One line per direction of a link. The rate holds for messages that are not large."""
    table = new_table(("from", "to"), ("latency", "rate", "accuracy"))
    for link in profile.links:
        table.add_row(str(link.primary), str(link.worker), *_direction(link.request))
        table.add_row(str(link.worker), str(link.primary), *_direction(link.reply))
    return table


def _direction(transfer: TransferProfile) -> tuple[str, str, str]:
    rate = _gigabytes(1 / transfer.beta_us_per_byte) if transfer.beta_us_per_byte else "-"
    return _microseconds(transfer.alpha_us), rate, f"{transfer.accuracy:.1%}"


def _microseconds(value: float) -> str:
    return f"{value:.3g} us"


def _gigabytes(bytes_per_us: float) -> str:
    return f"{bytes_per_us / 1e3:.3g} GB/s"
