"""Looking at processes, any of which may vanish between two looks, and waiting for what they do."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

DEADLINE = 300.0  # seconds after which a test gives up waiting for what must come: other work may slow the machine down


@dataclass(frozen=True)
class Look:
    """What one process was when it was looked at."""

    process: psutil.Process
    command: str
    variables: dict[str, str]


def family(process: psutil.Process) -> list[psutil.Process]:
    """The process, if it is there, and those of its descendants that are; ancestors come first."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:  # ended: its children have another parent now
        return []


def look(process: psutil.Process) -> Look | None:
    """None for a process that has ended, even if it waits to be reaped, and for one that ends during the look.

    The kernel empties the command and the environment of a process before it counts as ended.
    """
    try:
        command, variables = process.cmdline(), process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # includes zombies; the kernel refuses to show what ends
        return None
    return Look(process, " ".join(command), variables) if command and variables else None


def wait_until(is_true: Callable[[], object], what: str) -> None:
    """Looks again and again. AssertionError if it takes longer than `DEADLINE`."""
    deadline = time.monotonic() + DEADLINE
    while not is_true():
        assert time.monotonic() < deadline, f"not within {DEADLINE:.0f} s: {what}"
        time.sleep(0.01)


def kill(process: psutil.Process) -> None:
    """SIGKILL, if it is there."""
    with suppress(psutil.NoSuchProcess):
        process.kill()
