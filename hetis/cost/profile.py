"""Profiles in JSON files: those that users keep, and the cache of what was measured before."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from hetis.core.profile import DeviceProfile, ProfileKey

Kept = TypeVar("Kept", bound=msgspec.Struct)


def save(profile: msgspec.Struct, path: Path) -> None:
    """Writes a profile as JSON, in one piece: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")  # fleets that start at once may write the same profile
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    draft.replace(path)


def load(path: Path, kind: type[Kept]) -> Kept:
    """The profile in a JSON file. Raises ValueError, naming the file, when it cannot be read or is not a `kind`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ValueError(
            f"profile {path} cannot be read ({error.strerror}); run `hetis profile` to make one."
        ) from error
    except msgspec.MsgspecError as error:
        raise ValueError(f"profile {path} is not a {kind.__name__}: {error}; run `hetis profile` anew.") from error


def cached(folder: Path, key: ProfileKey) -> DeviceProfile | None:
    """What was measured before for `key`; None if nothing was, or the file is damaged or for something else."""
    try:
        found = load(folder / key.file_name, DeviceProfile)
    except ValueError:
        return None
    return found if found.key == key else None


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where profiles are kept: below XDG_CACHE_HOME, or ~/.cache without it."""
    base = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".cache")
    return Path(base) / "hetis" / "profiles"
