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
from hetis.cost.profile import save
from hetis.server.arguments import engine_arguments

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100
TOKENS = (1, 64, 1024)  # of a step, for which a layer's time is shown
MEBI = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the profile there, for --profile")


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from hetis.server.client import EngineClient
    from hetis.server.launch import plan_for
    from hetis.server.llm import make_config

    arguments = engine_arguments(options)
    del arguments["tokenizer"]
    config = make_config(**arguments)
    _, spec, plan = plan_for(config)
    client = EngineClient(config, plan)
    try:
        client.wait_until_ready()
        client.send(ProfileQuery())
        report = client.receive()
    finally:
        client.close()
    assert isinstance(report, ProfileReport)
    assert report.profile is not None
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for table in tables(report.profile, report.sources, spec, plan, resolve_dtype(config.dtype, spec)):
        console.print(table)
        console.print()
    if options.output is not None:
        save(report.profile, options.output)
        print(f"written to {options.output}")


def tables(
    profile: FleetProfile, sources: dict[int, str], spec: ModelSpec, plan: Plan, dtype: str
) -> "Iterator[Table]":
    """Decode attention by device, the primaries' other work, and links. `sources`: by rank, where numbers come from."""
    yield attention_table(profile, sources, plan)
    yield layers_table(profile, spec, plan, dtype)
    if profile.links:
        yield links_table(profile)


def attention_table(profile: FleetProfile, sources: dict[int, str], plan: Plan) -> "Table":
    table = _table(
        "Decode attention of a layer: max(floor, a heads + b MiB of KV + c) us",
        ("rank", "role", "device"),
        ("a", "b", "c", "floor", "accuracy", "reads", "usable"),
    )
    table.add_column("from", no_wrap=True)
    for member in plan.members():
        device = profile.devices[member.rank]
        attention = device.attention
        terms = (attention.a_us_per_head, attention.b_us_per_byte * MEBI, attention.c_us, attention.floor_us)
        table.add_row(
            str(member.rank),
            plan.role_of(member.rank),
            member.device,
            *(f"{term:.3g}" for term in terms),
            f"{attention.accuracy:.1%}",
            f"{_gigabytes(device.read_bytes_per_us)}",
            format_bytes(device.usable_bytes),
            sources[member.rank],
        )
    return table


def layers_table(profile: FleetProfile, spec: ModelSpec, plan: Plan, dtype: str) -> "Table":
    """Of the primaries: the layers' other work, by tokens of a step, and attention of prompts."""
    titles = [f"{tokens} token{'s' if tokens > 1 else ''}" for tokens in TOKENS]
    table = _table(
        "The rest of a layer, us; attention of prompts, ns for a head and a token that it sees",
        ("rank",),
        (*titles, "accuracy", "prompts", "accuracy"),
    )
    for stage in plan.stages:
        for index, primary in enumerate(stage.primaries):
            device, weights = profile.devices[primary.rank], layer_weights(spec, primary, index)
            assert device.dense is not None
            assert device.prefill is not None
            times = [device.dense.time_us(weights * DTYPE_BYTES[dtype], 2 * weights * tokens) for tokens in TOKENS]
            table.add_row(
                str(primary.rank),
                *(f"{time_us:.0f}" for time_us in times),
                f"{device.dense.accuracy:.1%}",
                f"{1e3 * device.prefill.us_per_pair:.3g}",
                f"{device.prefill.accuracy:.1%}",
            )
    return table


def links_table(profile: FleetProfile) -> "Table":
    table = _table(
        "Links: alpha us + bytes at that rate, there and back",
        ("link",),
        ("alpha", "rate", "accuracy", "back: alpha", "rate", "accuracy"),
    )
    for link in profile.links:
        table.add_row(f"{link.primary}->{link.worker}", *_direction(link.request), *_direction(link.reply))
    return table


def _direction(transfer: TransferProfile) -> tuple[str, str, str]:
    rate = _gigabytes(1 / transfer.beta_us_per_byte) if transfer.beta_us_per_byte else "-"
    return f"{transfer.alpha_us:.3g}", rate, f"{transfer.accuracy:.1%}"


def _gigabytes(bytes_per_us: float) -> str:
    return f"{bytes_per_us / 1e3:.3g} GB/s"


def _table(title: str, words: Iterable[str], numbers: Iterable[str]) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for word in words:
        table.add_column(word, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table
