"""How much memory and how many cores of its host this process may use.

Containers and batch systems limit processes by control groups (version 1, version 2, or both), which the numbers of the
host do not show. Every visible group that holds the process, and every group above it, counts. Formats: proc(5),
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the Linux kernel. `root` is the root of the file
system to read.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")

_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")  # above `high` the kernel throttles processes
_USAGES = ("memory.current", "memory.usage_in_bytes")
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")  # as in the kernel's MemAvailable


class Memory(NamedTuple):
    """Bytes."""

    total: int
    available: int  # without swapping, including reclaimable page cache


def usable_memory(root: Path = ROOT) -> Memory:
    """The least of the host and of all groups."""
    kib = {name.rstrip(":"): int(value) for name, value, *_ in _table(root / "proc/meminfo")}
    all_limits = [Memory(1024 * kib["MemTotal"], 1024 * kib["MemAvailable"])]
    for group in _groups("memory", root):
        all_limits += _memory_of(group)
    return Memory(min(each.total for each in all_limits), max(0, min(each.available for each in all_limits)))


def usable_cores(root: Path = ROOT) -> float:
    """Cores of the affinity mask, or CPU seconds per second that the groups allow, whichever is less."""
    return min([float(len(os.sched_getaffinity(0))), *map(_cores_of, _groups("cpu", root))])


def _memory_of(group: Path) -> list[Memory]:
    """The limit of a group; empty if it has none."""
    stat = {name: int(value) for name, value, *_ in _table(group / "memory.stat")}
    limits = [limit for name in _LIMITS if (limit := _number(group / name)) is not None]
    if "hierarchical_memory_limit" in stat:  # version 1: includes groups above that are not visible
        limits.append(stat["hierarchical_memory_limit"])
    usages = [usage for name in _USAGES if (usage := _number(group / name)) is not None]
    if not limits or not usages:
        return []
    # version 1: the plain names are the group alone, these include the groups below it
    reclaimable = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in _RECLAIMABLE)
    return [Memory(min(limits), min(limits) - usages[0] + min(reclaimable, usages[0]))]


def _cores_of(group: Path) -> float:
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    for both in _table(group / "cpu.max"):
        quota, period = (int(value) if value.isdigit() else None for value in both)
    return quota / period if quota and period and quota > 0 else math.inf  # -1 is no limit


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Directories of the groups that hold this process, from its own upwards."""
    mounts = list(_mounts(root))
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in mounts:
            if mount.holds(controller if controllers else ""):
                yield from mount.groups(path, root)


class _Mount(NamedTuple):
    kind: str  # "cgroup" or "cgroup2"
    options: list[str]  # version 1: the controllers are among them
    source: str  # the group that is mounted at `point`
    point: str

    def holds(self, controller: str) -> bool:
        """Whether groups of `controller` (version 1), or of version 2 (""), are mounted here."""
        return self.kind == "cgroup" and controller in self.options if controller else self.kind == "cgroup2"

    def groups(self, path: str, root: Path) -> Iterator[Path]:
        """`path`: of the process's group. If it is not below `source`, only the mounted group itself is visible."""
        top = root / self.point.lstrip("/")
        source = self.source.rstrip("/")
        below = path.removeprefix(source) if f"{path}/".startswith(f"{source}/") and ".." not in path else ""
        group = top / below.strip("/")
        yield from (each for each in (group, *group.parents) if each.is_relative_to(top))


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in _lines(root / "proc/self/mountinfo"):
        mounted, _, what = line.partition(" - ")
        kind, _, options = what.split(" ", 2)
        if kind.startswith("cgroup"):
            source, point = (text.replace("\\040", " ") for text in mounted.split(" ")[3:5])
            yield _Mount(kind, options.split(","), source, point)


def _table(path: Path) -> list[list[str]]:
    return [line.split() for line in _lines(path)]


def _number(path: Path) -> int | None:
    """The number in a file; None if the file is missing or says "max"."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
