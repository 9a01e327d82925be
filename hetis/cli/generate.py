"""`hetis generate`: texts for prompts, streamed to standard output; statistics per device on standard error."""

import argparse
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from hetis.cli.arguments import add_engine_arguments, add_sampling_arguments, engine_arguments, sampling_params
from hetis.cli.prompt_sources import SourcePrompt, prompts_of
from hetis.cli.writers import make_writer
from hetis.core.messages import FleetStats, MemberStats
from hetis.core.sizes import format_bytes, plural
from hetis.frontend.console import is_terminal, new_table, render, write_message
from hetis.frontend.progress import progress_bar
from hetis.frontend.requests import Piece

if TYPE_CHECKING:
    from rich.table import Table

TEMPERATURE = 0.7  # texts of small models are incoherent at 1
EXAMPLES = """examples:
  hetis generate                                              the small model in the package, example prompts
  hetis generate Qwen/Qwen3-0.6B --prompt "Once upon a time" --max-tokens 200 > story.txt
  hetis generate ./model --prompt-file prompts.txt --json > answers.jsonl
  echo "Once upon a time" | hetis generate ./model --plan 1+2
"""

_log = logging.getLogger("hetis")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `hetis generate`."""
    group = parser.add_argument_group("prompts and texts")
    sources = group.add_mutually_exclusive_group()
    prompt = "text of a prompt; may be repeated; default: standard input if it is a pipe or file, else examples"
    sources.add_argument("--prompt", action="append", metavar="TEXT", help=prompt)
    file = (
        'file with one prompt per line: text, or JSON objects {"prompt": "text"} or {"prompt_token_ids": [1, 2]}; '
        "-: standard input"
    )
    sources.add_argument("--prompt-file", metavar="FILE", help=file)
    lines = "write one line of JSON per prompt: index, prompt, text, token_ids, finish_reason"
    group.add_argument("--json", action="store_true", help=lines)
    echo = "write each prompt before its text; default: on terminals only"
    group.add_argument("--echo", action=argparse.BooleanOptionalAction, default=None, help=echo)
    no_stats = "write no table of statistics per device to standard error at the end"
    group.add_argument("--no-stats", dest="stats", action="store_false", help=no_stats)
    add_sampling_arguments(parser, max_tokens=96, temperature=TEMPERATURE)
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit code, 1 if the output of a prompt is missing or incomplete after an error."""
    from hetis.frontend.llm import LLM

    prompts, params = prompts_of(options), sampling_params(options)
    begin = time.perf_counter()
    with LLM(**engine_arguments(options)) as llm:
        ready = time.perf_counter()
        num_tokens, errors = _write_texts(options, prompts, llm.stream(prompts, params))
        seconds = time.perf_counter() - ready
        if options.stats and _log.isEnabledFor(logging.INFO):
            write_message(f"\n{summary(llm.fleet_stats(), options.block_size)}")
            write_message(
                f"{plural(num_tokens, 'token')} for {plural(len(prompts), 'prompt')} in {seconds:.2f} s: "
                f"{num_tokens / seconds:.1f} tokens/s, after a start of {ready - begin:.1f} s."
            )
    for index, reason in sorted(errors.items()):
        write_message(f"hetis: prompt {index}: {reason}")
    return 1 if errors else 0


def _write_texts(
    options: argparse.Namespace, prompts: Sequence[SourcePrompt], pieces: Iterable[Piece]
) -> tuple[int, dict[int, str]]:
    """Writes the texts; returns (number of tokens, errors by prompt)."""
    num_tokens, errors, begin = 0, {}, time.perf_counter()
    writer = make_writer(prompts, as_json=options.json, echo=options.echo)
    show = options.progress and len(prompts) > 1 and not is_terminal(sys.stdout)  # there the texts show the progress
    with progress_bar("prompts", len(prompts), show=show) as bar, closing(writer):
        for piece in pieces:
            writer.add(piece)
            num_tokens += len(piece.token_ids)
            if piece.finished:
                bar.advance(1, f"{num_tokens / (time.perf_counter() - begin):.1f} tokens/s")
            if piece.error is not None:
                errors[piece.prompt_index] = piece.error
    return num_tokens, errors


# --- statistics per device --------------------------------------------------------------------------------------------


def summary(stats: FleetStats, block_size: int) -> str:
    """A table with a line per rank, the meaning of its columns, and counts of placements and migrations."""
    caption = (
        f"heads: most query heads held at once; KV pages: most in use / all, each with {block_size} tokens of a KV "
        "head;\nattention: time in attention, share of the fleet's"
    )
    if _is_followed(stats):
        caption += "; us/layer: attention time of a layer in a step, measured (predicted)"
    return render(fleet_table(stats), caption + ".", counts(stats))


def counts(stats: FleetStats) -> str:
    """Numbers of placements, migrations and preemptions, in one sentence."""
    text = f"{plural(stats.num_dispatches, 'sequence')} placed on devices"
    if stats.num_migrations:
        text += f", {plural(stats.num_migrations, 'KV head')} migrated ({format_bytes(stats.migrated_bytes)})"
    if stats.num_preemptions:
        text += f", {plural(stats.num_preemptions, 'preemption')} for lack of KV pages"
    return text + "."


def fleet_table(stats: FleetStats) -> "Table":
    """The table of statistics. Columns that are empty for every rank are left out."""
    is_followed, is_sent = _is_followed(stats), any(any(member.bytes_sent.values()) for member in stats.members)
    numbers = ["heads", "KV pages", "attention", *(["us/layer"] if is_followed else [])]
    table = new_table(("rank", "role", "device"), numbers)
    if is_sent:
        table.add_column("sent to rank", no_wrap=True)
    for member in stats.members:
        cells = [
            str(member.rank),
            member.role,
            member.device,
            str(member.heads_peak),
            f"{member.pages_peak} / {member.pages_total}",
            f"{member.attention_seconds:.2f} s {member.attention_share:>4.0%}",
        ]
        if is_followed:
            cells.append(f"{member.measured_us:.0f} ({member.predicted_us:.0f})" if member.measured_us else "-")
        if is_sent:
            cells.append(_sent(member))
        table.add_row(*cells)
    return table


def _is_followed(stats: FleetStats) -> bool:
    """Whether the fleet predicts attention times and measures them while it serves."""
    return any(member.measured_us for member in stats.members)


def _sent(member: MemberStats) -> str:
    """Bytes sent, one line per link."""
    links = [f"{link.partition('->')[2]}: {format_bytes(count)}" for link, count in member.bytes_sent.items()]
    return "\n".join(links) or "-"
