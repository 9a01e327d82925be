"""Profiles of devices that were measured before, on the driver's host."""

import os
import sys
from collections.abc import Iterable

from hetis.core.messages import Setup
from hetis.core.profile import DeviceProfile, ProfileKey
from hetis.cost.profile import cache_folder, cached, save
from hetis.engine.profiling import profile_key


def cached_profiles(setup: Setup) -> dict[ProfileKey, DeviceProfile]:
    """Those that hold for devices of this fleet."""
    folder = cache_folder(os.environ)
    found = {key: cached(folder, key) for key in {profile_key(info, setup) for info in setup.fleet}}
    return {key: profile for key, profile in found.items() if profile is not None}


def keep_profiles(profiles: Iterable[DeviceProfile]) -> None:
    """For the next start. A folder that cannot be written costs some seconds then, and a line now."""
    folder = cache_folder(os.environ)
    try:
        for profile in profiles:
            save(profile, folder / profile.key.file_name)
    except OSError as error:
        print(f"hetis: profiles cannot be kept in {folder} ({error.strerror}).", file=sys.stderr, flush=True)
