"""How the processes of a fleet are started, so that the user's surroundings do not decide what they do.

They import nothing from the working directory, which `python -m` would put first on the path; they have standard
descriptors, whatever the shell closed, and output that cannot be written does not end them.
"""

import io
import os
import resource
import sys
from contextlib import suppress
from typing import Any

from hetis.processes import supervision

MOST_FILES = 1 << 16  # open in one process


def command(module: str, *arguments: str) -> list[str]:
    """The command line for `module` in a process of its own, with this interpreter. ValueError where there is none."""
    if not sys.executable:
        raise ValueError("this program does not know its Python interpreter (sys.executable): hetis starts it again.")
    flags = [flag for flag, is_set in (("-E", sys.flags.ignore_environment), ("-s", sys.flags.no_user_site)) if is_set]
    return [sys.executable, "-P", *flags, "-m", module, *arguments]


def environment() -> dict[str, str]:
    """That of this process. An empty entry of PYTHONPATH (`$PYTHONPATH:/more`) would be the working directory."""
    variables = dict(os.environ)
    if "PYTHONPATH" in variables:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, variables["PYTHONPATH"].split(os.pathsep)))
    return variables


def begin(parent: int | None = None) -> None:
    """First act of every process of a fleet. `parent`: the process with which this one ends."""
    if parent is not None:
        supervision.die_with_parent(parent)
    leave_deleted_directory()
    open_standard_descriptors()
    encoding = sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(_Lenient(2, "w", closefd=False), encoding, "backslashreplace", write_through=True)
    raise_file_limit()


def leave_deleted_directory() -> None:
    """Libraries (MKL, transformers) fail at start in a working directory that is gone. No path is relative to it."""
    try:
        os.getcwd()
    except OSError:
        os.chdir("/")


def open_standard_descriptors() -> None:
    """Where the shell has closed one (`>&-`), the next file that is opened would take its number, and all output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def raise_file_limit() -> None:
    """To the hard limit: the driver has some descriptors per rank, and ranks some per link."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Lenient(io.FileIO):
    """Drops what cannot be written: the reader of a pipe is gone, a disk is full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)
