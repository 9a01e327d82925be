"""Progress bars on stderr, if it is a terminal."""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from hetis.core.messages import Measuring
from hetis.frontend.console import is_terminal

_drawing = threading.Lock()  # held while a bar is visible: a terminal shows one at a time


class ProgressBar:
    """Progress over a known number of steps. Any thread may call `advance`."""

    def __init__(self, progress: Any = None, task: Any = None) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Adds `count` finished steps. `note`: text behind the bar, such as a speed; None: unchanged."""
        if self._progress is not None:
            fields = {} if note is None else {"note": note}
            self._progress.update(self._task, advance=count, **fields)


@contextmanager
def progress_bar(title: str, total: int, *, show: bool = True) -> Iterator[ProgressBar]:
    """Shows a bar for `total` steps while the block runs; it disappears at the end.

    Without effect unless `show`, if stderr is no terminal, or while another bar is visible.
    """
    if not (show and is_terminal(sys.stderr) and _drawing.acquire(blocking=False)):
        yield ProgressBar()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
            yield ProgressBar(progress, progress.add_task(title, total=total, note=""))
    finally:
        _drawing.release()


class MeasuringBar(ExitStack):
    """A bar for the progress of measuring, from the first message about it to the end of the block."""

    def __init__(self, show: bool) -> None:
        super().__init__()
        self._show, self._done = show, 0
        self._bar: ProgressBar | None = None

    def follow(self, message: Measuring) -> None:
        if self._bar is None:
            self._bar = self.enter_context(progress_bar("measuring devices and links", message.total, show=self._show))
        self._bar.advance(message.done - self._done)
        self._done = message.done
