"""Output to standard streams that may be closed, full, or unable to encode Unicode; and tables for terminals."""

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
    """Makes standard streams safe to use.

    Closed streams (`hetis … >&-`) become the null device; characters that the locale cannot encode are written as "?".
    """
    open_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def write(text: str) -> None:
    """Writes to standard output and flushes it.

    Raises BrokenPipeError if its reader has closed it, ValueError if it cannot be written for another reason.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise ValueError(f"standard output cannot be written ({error.strerror}); redirect it elsewhere.") from error


def write_message(text: str) -> None:
    """Writes a line to standard error; errors are ignored, since messages are not part of the result."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def drop_output() -> None:
    """Redirects standard output to the null device, so that the interpreter's final flush does not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def is_terminal(stream: object) -> bool:
    """Whether `stream` is a terminal; False for None, a process's missing stream."""
    return bool(getattr(stream, "isatty", bool)())


def new_table(words: Iterable[str], numbers: Iterable[str]) -> "Table":
    """A table with left-aligned columns titled `words`, then right-aligned ones titled `numbers`."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for word in words:
        table.add_column(word, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def render(*parts: "RenderableType") -> str:
    """Tables and paragraphs as text, one below the other, as wide as necessary, so that no column is cut."""
    from rich.console import Console

    console = Console(width=1000, color_system=None, highlight=False, legacy_windows=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
