"""Files that users name: those for output are checked before anything is computed, and written at the end."""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def refuse_pipe(path: Path, what: str) -> None:
    """Raises ValueError for a pipe or socket: several processes of a fleet open the file, each by its name."""
    with suppress(OSError):  # then opening it says why
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            raise ValueError(f"{what} {path} is a pipe or socket, which processes cannot share; name a file.")


def check_writable(path: Path, what: str, others: Iterable[object] = ()) -> None:
    """Raises ValueError where `write_file` would: no folder, a folder instead of a file, no permission.

    `what`: names the file in the message, like "--output". `others`: what other options name; where that is the path of
    the same file, one would destroy the other, which is refused, too. Leaves everything as it is: an existing file
    keeps its content, a new one does not stay, and no folder is made.
    """
    if any(isinstance(other, str) and _are_same(path, other) for other in others):
        raise ValueError(f"{what} {path} is the file of another option, too; name another one.")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not path.exists():
            new = os.path.realpath(path)  # of a link to a file that is still to be made
            with open(new, "xb"):
                os.unlink(new)
        elif path.is_file():
            path.open("ab").close()
        elif not os.access(path, os.W_OK):  # a pipe or device: to open and close it can be noticed at its other end
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise unwritable(path, what, error) from error


def write_file(path: Path, content: bytes, what: str) -> None:
    """Replaces what is in the file. Raises ValueError, naming `what` and the file, when it cannot be written."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise unwritable(path, what, error) from error


def _are_same(path: Path, other: str) -> bool:
    """Whether both are one file; what is written to a device destroys nothing."""
    with suppress(OSError, ValueError):  # one of them is no file yet, or no path at all
        return os.path.samefile(path, other) and path.is_file()
    return path == Path(other)


def unwritable(path: Path, what: str, error: OSError) -> ValueError:
    """The error for users where the system refuses `path` with `error`."""
    return ValueError(
        f"{what} {path} cannot be written ({error.strerror}); name a file in an existing folder that you may write to."
    )
