"""Files named by users. Output files are checked before anything is computed, and written at the end."""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def refuse_pipe(path: Path, what: str) -> None:
    """Raises ValueError for a pipe or socket, since several processes of a fleet open the file by its name."""
    with suppress(OSError):  # opening the file reports the error
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            raise ValueError(f"{what} {path} is a pipe or socket, which processes cannot share; name a file.")


def check_writable(path: Path, what: str, others: Iterable[object] = ()) -> None:
    """Raises ValueError where `write_file` would (no folder, a folder, no permission) or `others` name the same file.

    `what`: name of the file in the message, like "--output". `others`: values of other options, whose files would be
    overwritten. Changes nothing: an existing file keeps its content, a new one does not stay, and no folder is made.
    """
    if any(isinstance(other, str) and _are_same(path, other) for other in others):
        raise ValueError(f"{what} {path} is also the file of another option; name another one.")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not path.exists():
            new = os.path.realpath(path)  # the target, if the path is a link to a file that does not exist yet
            with open(new, "xb"):
                os.unlink(new)
        elif path.is_file():
            path.open("ab").close()
        elif not os.access(path, os.W_OK):  # a pipe or device: its reader would notice if it were opened and closed
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise unwritable(path, what, error) from error


def write_file(path: Path, content: bytes, what: str) -> None:
    """Replaces the content of a file. Raises ValueError, naming `what` and the file, if it cannot be written."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise unwritable(path, what, error) from error


def _are_same(path: Path, other: str) -> bool:
    """Whether both are the same regular file (writing to a device overwrites nothing)."""
    with suppress(OSError, ValueError):  # one of them does not exist yet, or is not a path
        return os.path.samefile(path, other) and path.is_file()
    return path == Path(other)


def unwritable(path: Path, what: str, error: OSError) -> ValueError:
    """The error for the user if the operating system refuses `path` with `error`."""
    return ValueError(
        f"{what} {path} cannot be written ({error.strerror}); name a file in an existing folder with write permission."
    )
