"""The private directory of a run: the fleet as its root has resolved it, the control sockets, and the failure reason,
if there is one."""

import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "hetis-"
_MAX_PLACE_BYTES = 107 - len(f"/{_PREFIX}12345678/health")  # the kernel's limit for the path of a socket is 107


def make_run_directory() -> Path:
    """A new directory that only this user can enter, with a name short enough for the sockets in it.

    Raises ValueError where there is no place for one.
    """
    named = [os.environ.get(name) for name in ("XDG_RUNTIME_DIR", "TMPDIR")]
    places = [place for place in (*named, "/tmp", "/var/tmp", "/dev/shm") if place]
    for place in places:
        if os.path.isabs(place) and len(os.fsencode(place)) <= _MAX_PLACE_BYTES:
            with suppress(OSError):
                directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
                if holds_sockets(directory):
                    return directory
                directory.rmdir()
    raise ValueError(
        f"there is no place for the sockets of a run: tried {', '.join(places)}. Set TMPDIR to a folder that can be "
        f"written to and whose path has at most {_MAX_PLACE_BYTES} bytes."
    )


def holds_sockets(directory: Path) -> bool:
    """Whether its file system takes sockets: those of some container hosts and networks do not."""
    trial = directory / "health"
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(trial))
        trial.unlink()
    except OSError:
        return False
    return True
