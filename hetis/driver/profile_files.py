"""Profiles in JSON files: those that users name, and the cache of earlier measurements on the driver's host."""

import errno
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from hetis.core.files import refuse_pipe, unwritable
from hetis.core.messages import Setup
from hetis.core.profile import KindProfile, ProfileKey
from hetis.driver.profiling import profile_key

ProfileT = TypeVar("ProfileT", bound=msgspec.Struct)

_log = logging.getLogger(__name__)


# --- files ------------------------------------------------------------------------------------------------------------


def save(profile: msgspec.Struct, path: Path) -> None:
    """Writes a profile of the cache as JSON, atomically: a reader sees the old file or the new one.

    Raises ValueError, naming the file, when it cannot be written; then no file is left.
    """
    with _draft(path) as draft:
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
        draft.replace(path)


def load(path: Path, kind: type[ProfileT]) -> ProfileT:
    """The profile in a JSON file. Raises ValueError, naming the file, when it cannot be read or holds no `kind`."""
    refuse_pipe(path, "profile")
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ValueError(
            f"profile {path} cannot be read ({error.strerror}); run `hetis profile` to make one."
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"profile {path} is not a file that `hetis profile` wrote ({error}); run `hetis profile` anew."
        ) from error


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A new file beside `path`, removed at the end unless it was renamed. Raises ValueError if the system refuses it.

    Its name is random: fleets that start at the same time write the same profile, in containers with the same pid.
    """
    draft = path.parent / f"{path.name}.{secrets.token_hex(8)}.part"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.touch(exist_ok=False)
        yield draft
    except OSError as error:
        raise unwritable(path, "profile", error) from error
    finally:
        with suppress(OSError):
            draft.unlink()


# --- cache ------------------------------------------------------------------------------------------------------------


def cached_profiles(setup: Setup) -> dict[ProfileKey, KindProfile]:
    """The kept profiles of devices of this fleet."""
    folder = cache_folder(os.environ)
    if folder is None:
        return {}
    found = {key: cached(folder, key) for key in {profile_key(info, setup) for info in setup.fleet}}
    return {key: profile for key, profile in found.items() if profile is not None}


def keep_profiles(profiles: Iterable[KindProfile]) -> None:
    """Keeps profiles for later starts. If that fails, a warning says so, and later starts measure again."""
    try:
        folder = cache_folder(os.environ)
        if folder is None:
            raise ValueError("neither XDG_CACHE_HOME nor HOME is an absolute path.")
        for profile in profiles:
            save(profile, folder / profile.key.file_name)
    except ValueError as error:
        _log.warning("measurements are not kept for later starts: %s", error)


def cached(folder: Path, key: ProfileKey) -> KindProfile | None:
    """The kept profile for `key`; None if there is none, or its file is damaged or holds another key."""
    try:
        found = load(folder / key.file_name, KindProfile)
    except ValueError:
        return None
    return found if found.key == key else None


def cache_folder(environment: Mapping[str, str]) -> Path | None:
    """The folder of kept profiles, below XDG_CACHE_HOME or ~/.cache; None where neither is an absolute path."""
    for name, below in (("XDG_CACHE_HOME", "hetis/profiles"), ("HOME", ".cache/hetis/profiles")):
        base = Path(environment.get(name, ""))
        if base.is_absolute():
            return base / below
    return None
