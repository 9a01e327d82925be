"""Files that users name for output: checked before anything is computed, written at the end."""

import errno
import os
from pathlib import Path


def check_writable(path: Path, what: str) -> None:
    """Raises ValueError where `write_file` would: no folder, a folder instead of a file, no permission.

    `what`: names the file in the message, like "--output". Leaves everything as it is: an existing file keeps its
    content, a new one does not stay, and no folder is made.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not path.exists():
            path.open("xb").close()
            path.unlink()
        elif path.is_file():
            path.open("ab").close()
        elif not os.access(path, os.W_OK):  # a pipe or device: to open and close it can be noticed at its other end
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _refusal(path, what, error) from error


def write_file(path: Path, content: bytes, what: str) -> None:
    """Replaces what is in the file. Raises ValueError, naming `what` and the file, when it cannot be written."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise _refusal(path, what, error) from error


def _refusal(path: Path, what: str, error: OSError) -> ValueError:
    return ValueError(
        f"{what} {path} cannot be written ({error.strerror}); name a file in an existing folder that you may write to."
    )
