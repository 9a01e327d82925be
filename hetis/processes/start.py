"""How a process of a fleet starts, so that the user's environment does not change what it does.

It imports nothing from the working directory, which `python -m` would put first on the path; it has the standard
descriptors that the shell closed, and output that cannot be written does not end it.
"""

import io
import os
import resource
import sys
from contextlib import suppress
from typing import Any

from hetis.processes import supervision

MAX_OPEN_FILES = 1 << 16


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `module` with this interpreter. Raises ValueError where Python does not know it."""
    if not sys.executable:
        raise ValueError(
            "sys.executable is empty, and hetis starts its processes with it; run this program with `python`, or set "
            "sys.executable to the path of the interpreter."
        )
    flags = [flag for flag, is_set in (("-E", sys.flags.ignore_environment), ("-s", sys.flags.no_user_site)) if is_set]
    return [sys.executable, "-P", *flags, "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's, without empty entries of PYTHONPATH (`$PYTHONPATH:/more`): they mean the working directory."""
    variables = dict(os.environ)
    if "PYTHONPATH" in variables:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, variables["PYTHONPATH"].split(os.pathsep)))
    return variables


def begin(parent: int | None = None) -> None:
    """The first call of every process of a fleet. `parent`: pid of the process with which this one ends."""
    if parent is not None:
        supervision.die_with_parent(parent)
    leave_deleted_directory()
    open_standard_descriptors()
    encoding = sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(_Lenient(2, "w", closefd=False), encoding, "backslashreplace", write_through=True)
    raise_file_limit()


def leave_deleted_directory() -> None:
    """Leaves a working directory that has been deleted: libraries (MKL, transformers) fail to start in one."""
    try:
        os.getcwd()
    except OSError:
        os.chdir("/")


def open_standard_descriptors() -> None:
    """Opens those that the shell has closed (`>&-`), whose numbers, and output, the next files opened would get."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def raise_file_limit() -> None:
    """Raises the soft limit to the hard one: the driver has some descriptors per rank, and ranks some per link."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Lenient(io.FileIO):
    """Drops what cannot be written, when the reader of a pipe has gone or a disk is full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)
