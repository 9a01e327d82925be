"""`hetis generate`: several prompts at once, streamed, then the fleet's table."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

from hetis.core.messages import FleetStats
from hetis.core.sizes import format_bytes
from hetis.server.arguments import add_sampling_arguments, engine_arguments, sampling_params

if TYPE_CHECKING:
    from rich.table import Table

DEMO_PROMPTS = (  # the model in the package has read the documentation of Python
    "The function returns",
    "If the file does not exist,",
    "A list is a sequence of",
    "This module provides",
)
TEMPERATURE = 0.7  # small models wander off at 1
WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", help="may be given several times; left out: some examples")
    parser.add_argument("--no-stats", dest="stats", action="store_false", help="no table of devices at the end")
    add_sampling_arguments(parser, max_tokens=96, temperature=TEMPERATURE)


def run(options: argparse.Namespace) -> None:
    from hetis.server.llm import LLM

    prompts = options.prompt or list(DEMO_PROMPTS)
    params = sampling_params(options)
    begin = time.perf_counter()
    with LLM(**engine_arguments(options)) as llm:
        ready = time.perf_counter()
        printer = LinePrinter(prompts)
        num_tokens = 0
        for piece in llm.stream(prompts, params):
            num_tokens += len(piece.token_ids)
            printer.add(piece.prompt_index, piece.text, piece.finished)
        seconds = time.perf_counter() - ready
        if options.stats:
            print_fleet(llm.fleet_stats())
    print(
        f"\n{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s, "
        f"{len(prompts)} prompts at once (the fleet was up after {ready - begin:.1f} s)"
    )


class LinePrinter:
    """Streams several texts to one terminal: each in lines of its own, marked with the number of its prompt."""

    def __init__(self, prompts: list[str]) -> None:
        self._pending = [*prompts]
        self._prefix = [f"[{index}] " for index in range(len(prompts))]
        self._width = WIDTH - len(self._prefix[-1])

    def add(self, index: int, text: str, finished: bool) -> None:
        """Prints the lines of one prompt's text that `text` completes, at word borders."""
        self._pending[index] += text
        while "\n" in self._pending[index] or len(self._pending[index]) > self._width:
            self._print(index, *self._split(self._pending[index]))
        if finished and self._pending[index]:
            self._print(index, self._pending[index], "")

    def _split(self, text: str) -> tuple[str, str]:
        """(a line, the rest)."""
        line, newline, rest = text.partition("\n")
        if newline and len(line) <= self._width:
            return line, rest
        border = text.rfind(" ", 0, self._width + 1)
        border = self._width if border <= 0 else border
        return text[:border], text[border:].removeprefix(" ")

    def _print(self, index: int, line: str, rest: str) -> None:
        self._pending[index] = rest
        if line:
            print(f"{self._prefix[index]}{line}")
            sys.stdout.flush()


def print_fleet(stats: FleetStats) -> None:
    """One line per device: role, heads held, pages, share of attention time, bytes over each link."""
    from rich.console import Console

    # a pipe has no width; a table that is cut is worse than a line that wraps
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print()
    console.print(fleet_table(stats))
    console.print(f"\n{moves(stats)}", highlight=False)


def moves(stats: FleetStats) -> str:
    """What the dispatcher did, in one sentence."""
    text = f"{stats.num_dispatches} sequences placed"
    if stats.num_migrations:
        text += f", {stats.num_migrations} lanes moved ({format_bytes(stats.migrated_bytes)})"
    if stats.num_preemptions:
        text += f", {stats.num_preemptions} sequences started over"
    followed = [member for member in stats.members if member.measured_us]
    for member in followed:
        text += (
            f"; rank {member.rank}: attention {member.measured_us:.0f} us a layer, {member.predicted_us:.0f} predicted"
        )
    return text + "."


def fleet_table(stats: FleetStats) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("rank", "role", "device"):
        table.add_column(title, no_wrap=True)
    for title in ("heads", "peak", "KV pages", "peak", "of", "attention"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("sent to", no_wrap=True)
    for member in stats.members:
        sent = [f"{link.partition('->')[2]}: {format_bytes(count)}" for link, count in member.bytes_sent.items()]
        table.add_row(
            str(member.rank),
            member.role,
            member.device,
            str(member.heads),
            str(member.heads_peak),
            str(member.pages_used),
            str(member.pages_peak),
            str(member.pages_total),
            f"{member.attention_seconds:.2f} s {member.attention_share:>4.0%}",
            "\n".join(sent) or "-",  # a line for each link
        )
    return table
