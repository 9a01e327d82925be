"""`hetis generate`: several prompts at once, streamed, then the fleet's table."""

import argparse
import sys
import time

from hetis.core.sizes import format_bytes
from hetis.server.arguments import add_sampling_arguments, engine_arguments, sampling_params

DEMO_PROMPTS = ("The", "In the beginning", "He said", "It was")
WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", help="may be given several times; left out: some examples")
    parser.add_argument("--no-stats", dest="stats", action="store_false", help="no table of devices at the end")
    add_sampling_arguments(parser, max_tokens=96)


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
        end = time.perf_counter()
        if options.stats:
            print_fleet(llm)
        print(
            f"\n{num_tokens} tokens in {end - ready:.2f} s: {num_tokens / (end - ready):.1f} tokens/s "
            f"({len(prompts)} prompts at once; the fleet was up after {ready - begin:.1f} s)"
        )


class LinePrinter:
    """Streams several texts to one terminal: each in lines of its own, marked with the number of its prompt."""

    def __init__(self, prompts: list[str]) -> None:
        self._pending = [*prompts]
        self._prefix = [f"[{index}] " for index in range(len(prompts))]

    def add(self, index: int, text: str, finished: bool) -> None:
        """Prints the lines of one prompt's text that `text` completes, at word borders."""
        self._pending[index] += text
        while "\n" in self._pending[index] or len(self._pending[index]) > WIDTH:
            self._print(index, *self._split(self._pending[index]))
        if finished and self._pending[index]:
            self._print(index, self._pending[index], "")

    @staticmethod
    def _split(text: str) -> tuple[str, str]:
        line, newline, rest = text.partition("\n")
        if newline and len(line) <= WIDTH:
            return line, rest
        border = text.rfind(" ", 0, WIDTH)
        border = WIDTH if border <= 0 else border
        return text[:border], text[border:].removeprefix(" ")

    def _print(self, index: int, line: str, rest: str) -> None:
        self._pending[index] = rest
        if line:
            print(f"{self._prefix[index]}{line}")
            sys.stdout.flush()


def print_fleet(llm: object) -> None:
    """One line per device: role, heads held, pages, share of attention time, bytes over each link."""
    from rich.console import Console
    from rich.table import Table

    stats = llm.fleet_stats()  # type: ignore[attr-defined]
    table = Table(title="fleet")
    for title in (
        "rank",
        "role",
        "device",
        "heads (peak)",
        "KV pages used (peak) / all",
        "attention time",
        "sent over links",
    ):
        table.add_column(title, justify="left" if title in ("role", "device", "sent over links") else "right")
    for member in stats.members:
        sent = ", ".join(f"{link} {format_bytes(count)}" for link, count in member.bytes_sent.items()) or "-"
        table.add_row(
            str(member.rank),
            member.role,
            member.device,
            f"{member.heads} ({member.heads_peak})",
            f"{member.pages_used} ({member.pages_peak}) / {member.pages_total}",
            f"{member.attention_seconds:.3f} s, {member.attention_share:.0%}",
            sent,
        )
    Console().print(table)
