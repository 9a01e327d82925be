"""Standard streams that may be closed, full, slow, or not able to write all of Unicode; and tables for terminals."""

import io
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from hetis.processes.start import open_standard_descriptors

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def prepare_streams() -> None:
    """The caller's standard streams never end a run.

    Closed ones (`hetis … >&-`) become the null device; a character that the locale's encoding lacks is written as "?".
    """
    open_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def write(text: str) -> None:
    """To standard output, at once. BrokenPipeError when its reader is gone; ValueError when it cannot be written."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise ValueError(f"standard output cannot be written ({error.strerror}).") from error


def write_message(text: str) -> None:
    """A line on standard error; lost where that cannot be written: it is no part of the result."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def drop_output() -> None:
    """What is still buffered for standard output has no reader: the interpreter's end must not try, and fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def is_terminal(stream: object) -> bool:
    return bool(getattr(stream, "isatty", bool)())


def new_table(words: Iterable[str], numbers: Iterable[str]) -> "Table":
    """Columns of words, then of numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for word in words:
        table.add_column(word, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def render(*parts: "RenderableType") -> str:
    """Text of tables and paragraphs, one below the other, as wide as they need: a table must not be cut."""
    from rich.console import Console

    console = Console(width=1000, color_system=None, highlight=False, legacy_windows=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
