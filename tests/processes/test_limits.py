"""Limits of control groups: from file trees like those of the kernel, and from a real group where one can be made."""

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from hetis.processes.limits import Memory, usable_cores, usable_memory

GIB = 1 << 30
UNLIMITED_V1 = 9223372036854771712
CORES = len(os.sched_getaffinity(0))
HOST = Memory(64 * GIB, 48 * GIB)

V1_MOUNTS = (
    "25 20 0:20 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n"
    "31 25 0:26 {root} /sys/fs/cgroup/cpu,cpuacct ro,nosuid master:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 25 0:27 {root} /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory\n"
)
V2_MOUNTS = "31 25 0:26 / /sys/fs/cgroup ro,nosuid,nodev master:4 - cgroup2 cgroup rw,nsdelegate,memory_recursiveprot\n"
V1_GROUPS = "8:cpu,cpuacct:{path}\n4:memory:{path}\n1:name=systemd:{path}\n"


class Host:
    """A root directory with a /proc and a /sys of the test."""

    def __init__(self, root: Path, groups: str, mounts: str) -> None:
        self.root = root
        total, available = HOST.total >> 10, HOST.available >> 10
        meminfo = f"MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {available} kB\nHugePages_Total: 0\n"
        self.write("proc", {"meminfo": meminfo, "self/cgroup": groups, "self/mountinfo": mounts})

    def write(self, directory: str, files: Mapping[str, object]) -> None:
        for name, content in files.items():
            path = self.root / directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(content))

    @property
    def memory(self) -> Memory:
        return usable_memory(self.root)

    @property
    def cores(self) -> float:
        return usable_cores(self.root)


def version_1(tmp_path: Path, path: str = "/", root: str = "/") -> Host:
    return Host(tmp_path, V1_GROUPS.format(path=path), V1_MOUNTS.format(root=root))


def version_2(tmp_path: Path, path: str) -> Host:
    return Host(tmp_path, f"0::{path}\n", V2_MOUNTS)


def test_without_groups_the_host_counts(tmp_path: Path) -> None:
    host = Host(tmp_path, "", "")
    assert (host.memory, host.cores) == (HOST, CORES)
    (tmp_path / "proc/self/cgroup").unlink()
    (tmp_path / "proc/self/mountinfo").unlink()
    assert (host.memory, host.cores) == (HOST, CORES)


def test_version_2_counts_what_files_in_memory_would_give_back(tmp_path: Path) -> None:
    host = version_2(tmp_path, "/")
    stat = f"anon {GIB}\nfile {2 * GIB}\ninactive_file {GIB}\nactive_file {GIB}\nslab_reclaimable 4096\n"
    host.write("sys/fs/cgroup", {"memory.max": 8 * GIB, "memory.current": 5 * GIB, "memory.stat": stat})
    host.write("sys/fs/cgroup", {"memory.high": "max", "cpu.max": "60000 100000"})
    assert host.memory == Memory(8 * GIB, 5 * GIB + 4096)
    assert host.cores == pytest.approx(0.6)


def test_a_group_gives_back_no_more_than_it_uses(tmp_path: Path) -> None:
    """The two figures are read one after the other."""
    host = version_2(tmp_path, "/")
    files = {"memory.max": 8 * GIB, "memory.current": GIB, "memory.stat": f"inactive_file {2 * GIB}\n"}
    host.write("sys/fs/cgroup", files)
    assert host.memory == Memory(8 * GIB, 8 * GIB)


def test_the_limit_at_which_the_kernel_slows_down_counts(tmp_path: Path) -> None:
    host = version_2(tmp_path, "/")
    host.write("sys/fs/cgroup", {"memory.max": 8 * GIB, "memory.high": 6 * GIB, "memory.current": GIB})
    assert host.memory == Memory(6 * GIB, 5 * GIB)


@pytest.mark.parametrize(("own", "slice_"), [("max", 4 * GIB), (16 * GIB, 4 * GIB), (3 * GIB, "max")])
def test_version_2_every_group_above_counts(tmp_path: Path, own: object, slice_: object) -> None:
    """As in systemd's slices: a service in a slice, both with limits."""
    host = version_2(tmp_path, "/user.slice/job.service")
    top, job = "sys/fs/cgroup/user.slice", "sys/fs/cgroup/user.slice/job.service"
    host.write(top, {"memory.max": slice_, "memory.current": 2 * GIB, "cpu.max": "max 100000"})
    host.write(job, {"memory.max": own, "memory.current": GIB, "cpu.max": "150000 100000"})
    host.write("sys/fs/cgroup/other", {"memory.max": 1, "memory.current": 1, "cpu.max": "1 100000"})
    assert host.memory.available == 2 * GIB
    assert host.cores == min(CORES, 1.5)


def test_nothing_is_left_of_a_limit_that_is_exceeded(tmp_path: Path) -> None:
    host = version_2(tmp_path, "/")
    host.write("sys/fs/cgroup", {"memory.max": GIB, "memory.current": 2 * GIB})
    assert host.memory == Memory(GIB, 0)


def test_version_1_without_limits(tmp_path: Path) -> None:
    host = version_1(tmp_path)
    host.write("sys/fs/cgroup/memory", {"memory.limit_in_bytes": UNLIMITED_V1, "memory.usage_in_bytes": GIB})
    host.write("sys/fs/cgroup/cpu,cpuacct", {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000})
    assert (host.memory, host.cores) == (HOST, CORES)


@pytest.mark.parametrize(
    ("path", "root", "directory"),
    [
        ("/", "/", ""),  # a name space of its own
        ("/docker/abc", "/docker/abc", ""),  # docker: the group is mounted, and named as on the host
        ("/kubepods/pod1/abc", "/", "kubepods/pod1/abc"),  # no container, or all of the tree is visible
        ("/docker/abc/worker", "/docker/abc", "worker"),
        ("/elsewhere", "/docker/abc", ""),  # the tree that is visible is another one: its top is all there is
        ("/../abc", "/", ""),  # outside of this name space
        ("/docker/abcdef", "/docker/abc", ""),  # a name that only begins like the mounted one
    ],
)
def test_version_1_wherever_the_group_is_mounted(tmp_path: Path, path: str, root: str, directory: str) -> None:
    host = version_1(tmp_path, path, root)
    stat = (
        f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file 0\nhierarchical_memory_limit {UNLIMITED_V1}\n"
    )
    host.write(
        f"sys/fs/cgroup/memory/{directory}",
        {"memory.limit_in_bytes": 4 * GIB, "memory.usage_in_bytes": 3 * GIB, "memory.stat": stat},
    )
    quota = {"cpu.cfs_quota_us": 50000, "cpu.cfs_period_us": 100000}
    host.write(f"sys/fs/cgroup/cpu,cpuacct/{directory}", quota)
    assert host.memory == Memory(4 * GIB, 2 * GIB)
    assert host.cores == 0.5


def test_version_1_knows_of_limits_that_are_not_visible(tmp_path: Path) -> None:
    host = version_1(tmp_path)
    files = {
        "memory.limit_in_bytes": UNLIMITED_V1,
        "memory.usage_in_bytes": GIB,
        "memory.stat": f"hierarchical_memory_limit {2 * GIB}\n",
    }
    host.write("sys/fs/cgroup/memory", files)
    assert host.memory == Memory(2 * GIB, GIB)


def test_both_versions_at_once(tmp_path: Path) -> None:
    """As systemd mounts them in hybrid mode: version 2 without controllers, beside those of version 1."""
    mounts = V1_MOUNTS.format(root="/") + "40 25 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n"
    host = Host(tmp_path, V1_GROUPS.format(path="/a") + "0::/a\n", mounts)
    host.write("sys/fs/cgroup/memory/a", {"memory.limit_in_bytes": 4 * GIB, "memory.usage_in_bytes": GIB})
    host.write("sys/fs/cgroup/unified/a", {"memory.max": 2 * GIB, "memory.current": GIB, "cpu.max": "25000 100000"})
    assert host.memory == Memory(2 * GIB, GIB)
    assert host.cores == 0.25


def test_mount_points_with_spaces(tmp_path: Path) -> None:
    host = Host(tmp_path, "0::/\n", r"31 25 0:26 / /my\040groups rw - cgroup2 cgroup rw" + "\n")
    host.write("my groups", {"memory.max": GIB, "memory.current": 0})
    assert host.memory.total == GIB


def test_this_machine() -> None:
    memory = usable_memory()
    assert 0 < memory.available <= memory.total
    assert 0 < usable_cores() <= CORES
    assert not math.isinf(usable_cores())


ASK = "from hetis.processes.limits import *; print(*usable_memory(), usable_cores())"


def test_a_real_group(groups: dict[str, Path]) -> None:
    limit = 256 << 20
    (groups["memory"] / "memory.limit_in_bytes").write_text(str(limit))
    (groups["cpu"] / "cpu.cfs_quota_us").write_text("60000")
    join = "; ".join(f"echo $$ > {path}/cgroup.procs" for path in groups.values())
    said = subprocess.check_output(["bash", "-c", f'{join}; exec "$0" -c "$1"', sys.executable, ASK], text=True)
    total, available, cores = map(float, said.split())
    assert (total, cores) == (limit, 0.6)
    assert 128 << 20 < available < limit
