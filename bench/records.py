"""Where benchmarks keep rows and pictures, and what rows say of time, machine and code."""

import os
import platform
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
FOLDER = "HETIS_BENCH_RESULTS"  # environment variable: another folder, for runs whose rows are not to be kept


def folder() -> Path:
    """The folder of rows and pictures: bench/results, unless the environment names another. Made if need be."""
    found = Path(os.environ.get(FOLDER) or HERE / "bench/results")
    found.mkdir(exist_ok=True)
    return found


def append(name: str, row: bytes) -> None:
    """Appends a line of JSON to a file of the folder."""
    with (folder() / name).open("ab") as file:
        file.write(row + b"\n")


def commit(tree: Path = HERE) -> str:
    """Abbreviated commit of a checkout, followed by + if it has uncommitted changes outside bench/results."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=tree, capture_output=True, text=True, check=True).stdout.strip()

    dirty = git("status", "--porcelain", "--", ":/", ":!bench/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")


def date() -> str:
    return time.strftime("%Y-%m-%d")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0] if names else platform.machine()}, Linux {platform.release()}"
