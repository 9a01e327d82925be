"""`hetis profile`: starts the fleet, measures every device and link, shows what came out, writes it to a file."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hetis.core.messages import ProfileQuery, ProfileReport
from hetis.core.model_spec import DTYPE_BYTES, ModelSpec, resolve_dtype
from hetis.core.plan import Plan
from hetis.core.profile import FleetProfile, TransferProfile
from hetis.core.sizes import format_bytes
from hetis.cost.footprint import layer_weights
from hetis.engine.profile_files import check_writable, save
from hetis.server.arguments import engine_arguments

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100
TOKENS = (1, 64, 1024)  # of a step, for which a layer's time is shown
MEBI = 1 << 20
NAME_WIDTH = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the profile there, for --profile")


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from hetis.server.client import EngineClient
    from hetis.server.launch import plan_for
    from hetis.server.llm import make_config

    if options.output is not None:
        check_writable(options.output)  # before measuring
    config = make_config(**engine_arguments(options))
    _, spec, plan = plan_for(config)
    client = EngineClient(config, plan)
    try:
        client.wait_until_ready()
        report = client.ask(ProfileQuery(), ProfileReport)
    finally:
        client.close()
    assert report.profile is not None
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for title, table in tables(report.profile, report.sources, spec, plan, resolve_dtype(config.dtype, spec)):
        console.print(title, highlight=False, soft_wrap=True)
        console.print(table)
        console.print()
    if options.output is not None:
        save(report.profile, options.output)
        print(f"written to {options.output}")


def tables(
    profile: FleetProfile, sources: dict[int, str], spec: ModelSpec, plan: Plan, dtype: str
) -> "Iterator[tuple[str, Table]]":
    """With their titles. `sources`: by rank, where its numbers come from."""
    yield "Devices", devices_table(profile, sources, plan)
    yield "Decode attention of a layer, us: max(floor, a x heads + b x MiB of KV + c)", attention_table(profile)
    steps = ", ".join(map(str, TOKENS))
    yield (
        f"The rest of a layer, us, for {steps} tokens; attention of prompts, ns for each head and token it sees",
        layers_table(profile, spec, plan, dtype),
    )
    if profile.links:
        yield "Links, there and back: alpha us, and bytes at the rate", links_table(profile)


def devices_table(profile: FleetProfile, sources: dict[int, str], plan: Plan) -> "Table":
    table = _table(("rank", "role", "device", "name"), ("reads", "usable"))
    table.add_column("from", no_wrap=True)
    for member in plan.members():
        device = profile.devices[member.rank]
        name = device.key.device if len(device.key.device) <= NAME_WIDTH else device.key.device[: NAME_WIDTH - 1] + "…"
        reads, usable = _gigabytes(device.read_bytes_per_us), format_bytes(device.usable_bytes)
        role = plan.role_of(member.rank)
        table.add_row(str(member.rank), role, member.device, name, reads, usable, sources[member.rank])
    return table


def attention_table(profile: FleetProfile) -> "Table":
    table = _table(("rank",), ("a", "b", "c", "floor", "accuracy"))
    for rank, device in profile.devices.items():
        found = device.attention
        terms = (found.a_us_per_head, found.b_us_per_byte * MEBI, found.c_us, found.floor_us)
        table.add_row(str(rank), *(f"{term:.3g}" for term in terms), f"{found.accuracy:.1%}")
    return table


def layers_table(profile: FleetProfile, spec: ModelSpec, plan: Plan, dtype: str) -> "Table":
    """Of the primaries."""
    table = _table(("rank",), (*map(str, TOKENS), "accuracy", "prompts", "accuracy"))
    for stage in plan.stages:
        for index, primary in enumerate(stage.primaries):
            layer, weights = profile.devices[primary.rank].layer, layer_weights(spec, primary, index)
            assert layer is not None, f"rank {primary.rank} is a primary without a profile of its layers"
            times = [layer.dense.time_us(weights * DTYPE_BYTES[dtype], 2 * weights * tokens) for tokens in TOKENS]
            prompts = layer.prefill
            table.add_row(
                str(primary.rank),
                *(f"{time_us:.0f}" for time_us in times),
                f"{layer.dense.accuracy:.1%}",
                *(("-", "-") if prompts is None else (f"{1e3 * prompts.us_per_pair:.3g}", f"{prompts.accuracy:.1%}")),
            )
    return table


def links_table(profile: FleetProfile) -> "Table":
    """The rate is that of messages which are not large."""
    table = _table(("link",), ("alpha", "rate", "accuracy", "alpha", "rate", "accuracy"))
    for link in profile.links:
        table.add_row(f"{link.primary}->{link.worker}", *_direction(link.request), *_direction(link.reply))
    return table


def _direction(transfer: TransferProfile) -> tuple[str, str, str]:
    rate = _gigabytes(1 / transfer.beta_us_per_byte) if transfer.beta_us_per_byte else "-"
    return f"{transfer.alpha_us:.3g}", rate, f"{transfer.accuracy:.1%}"


def _gigabytes(bytes_per_us: float) -> str:
    return f"{bytes_per_us / 1e3:.3g} GB/s"


def _table(words: Iterable[str], numbers: Iterable[str]) -> "Table":
    """Columns of words, then of numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for word in words:
        table.add_column(word, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table
