"""Rows and table of `bench/gpu_check.sh`.

    report.py machine OUT                      prints the machine as a result, and keeps it in OUT/machine.json
    report.py extensions                       exit code 1, after the reason, if a C++ extension cannot be used
    report.py add OUT PHASE OUTCOME SECONDS    appends a row with the results that the phase printed into OUT/phase.log
    report.py table OUT                        prints the rows of the last run

A phase prints a result as a line `RESULT {"name": figure, ...}`; for pytest the counts in its last line are used.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

ROWS, MACHINE = "gpu_check.jsonl", "machine.json"
RUN = f"{os.getppid()}"  # the pid of the script, shared by the rows of one run


def machine() -> dict[str, Any]:
    """GPU, driver, versions, and what is needed to compile."""
    import torch
    import transformers
    import triton

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"triton": triton.__version__, "transformers": transformers.__version__}
    found |= {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    found |= {"c++": shutil.which("g++") or "none"}
    folders = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    found["Python.h"] = any(Path(folder, "Python.h").exists() for folder in folders)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        if shutil.which("nvidia-smi"):
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


def keep_machine(out: Path) -> None:
    found = machine()
    (out / MACHINE).write_text(json.dumps(found))
    print("RESULT " + json.dumps(found))


def results_in(log: Path) -> dict[str, Any]:
    """Results in the output of a phase."""
    found: dict[str, Any] = {}
    if not log.exists():
        return found
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("RESULT "):
            found |= json.loads(line.removeprefix("RESULT "))
        elif re.search(r"\d+ (passed|failed|errors?)\b.* in [\d.]+s", line):
            found |= {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|errors?|skipped)", line)}
    return found


def commit() -> str | None:
    """Abbreviated commit of this checkout; None without git, or in a copy without history."""
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "--short", "HEAD"]
    folder = Path(__file__).parent
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip() or None


def extensions() -> None:
    from hetis.dispatcher import native
    from hetis_kernels import extension

    problems = [problem for problem in (extension.problem(), native.problem()) if problem]
    print("\n".join(problems))
    sys.exit(bool(problems))


def add(out: Path, phase: str, outcome: str, seconds: int) -> None:
    about = out / MACHINE
    row = {
        "run": RUN,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit(),
        "machine": json.loads(about.read_text()) if about.exists() else {},
        "phase": phase,
        "outcome": outcome,
        "seconds": seconds,
        "figures": results_in(out / "phase.log"),
    }
    with (out / ROWS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def table(out: Path) -> None:
    """Prints the rows of this run; exit code 1 if a phase failed."""
    rows = [json.loads(line) for line in (out / ROWS).read_text().splitlines()]
    rows = [row for row in rows if row["run"] == RUN]
    for row in rows:
        figures = ", ".join(f"{name} {figure}" for name, figure in row["figures"].items())
        print(f"{row['phase']:12}{row['outcome']:14}{row['seconds']:4} s  {figures}")
    sys.exit(not all(row["outcome"] == "ok" or row["outcome"].startswith("needs ") for row in rows))


def main() -> None:
    match sys.argv[1:]:
        case ["machine", out]:
            keep_machine(Path(out))
        case ["extensions"]:
            extensions()
        case ["add", out, phase, outcome, seconds]:
            add(Path(out), phase, outcome, int(seconds))
        case ["table", out]:
            table(Path(out))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
