"""How much of its host this process may use: memory and cores.

Containers and batch systems limit processes by control groups (version 1, version 2, or both at once), which the
figures of the whole host do not show. A limit of any group above the process counts, as far as it is visible here.
Formats: proc(5), Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the Linux kernel. `root` is the
root of the file system to look at.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")

_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")  # beyond `high` processes are slowed to a crawl
_USAGES = ("memory.current", "memory.usage_in_bytes")
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")  # as in the kernel's own MemAvailable


class Memory(NamedTuple):
    """Bytes."""

    total: int
    available: int  # without swapping; what the page cache would give back included


def usable_memory(root: Path = ROOT) -> Memory:
    """Of the host, or of the group with the least room."""
    kib = {name.rstrip(":"): int(value) for name, value, *_ in _table(root / "proc/meminfo")}
    all_limits = [Memory(1024 * kib["MemTotal"], 1024 * kib["MemAvailable"])]
    for group in _groups("memory", root):
        all_limits += _memory_of(group)
    return Memory(min(each.total for each in all_limits), max(0, min(each.available for each in all_limits)))


def usable_cores(root: Path = ROOT) -> float:
    """Cores that this process may run on, or the CPU time per time that its groups have, whichever is less."""
    return min([float(len(os.sched_getaffinity(0))), *map(_cores_of, _groups("cpu", root))])


def _memory_of(group: Path) -> list[Memory]:
    """The limit of a group, if it has one."""
    stat = {name: int(value) for name, value, *_ in _table(group / "memory.stat")}
    limits = [limit for name in _LIMITS if (limit := _number(group / name)) is not None]
    if "hierarchical_memory_limit" in stat:  # version 1: also of groups above that are not visible here
        limits.append(stat["hierarchical_memory_limit"])
    usages = [usage for name in _USAGES if (usage := _number(group / name)) is not None]
    if not limits or not usages:
        return []
    # version 1 counts the group itself under the plain names, and the groups below it with it under these
    reclaimable = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in _RECLAIMABLE)
    return [Memory(min(limits), min(limits) - usages[0] + min(reclaimable, usages[0]))]


def _cores_of(group: Path) -> float:
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    for both in _table(group / "cpu.max"):
        quota, period = (int(value) if value.isdigit() else None for value in both)
    return quota / period if quota and period and quota > 0 else math.inf  # -1 is no limit


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The directories of the groups that hold this process, from its own upwards."""
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
    source: str  # the group that is seen at `point`
    point: str

    def holds(self, controller: str) -> bool:
        """`controller`: of version 1; "": version 2."""
        return self.kind == "cgroup" and controller in self.options if controller else self.kind == "cgroup2"

    def groups(self, path: str, root: Path) -> Iterator[Path]:
        """`path`: of the process's group. Where it is not below `source`, what is mounted is all there is to see."""
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
    """None for a file that is not there or says "max"."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
