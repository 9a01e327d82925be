"""A fleet as a process to watch and to hurt: its members, its output, and what it leaves."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

from tests.processes.look import DEADLINE, Look, family, kill, look

ROOT = Path(__file__).parent.parent.parent
SHIM = Path(__file__).parent / "shim"
END_SECONDS = 50.0

# `hetis generate` for many minutes: a test ends it, however fast the engine becomes. "[0]" is printed with the first
# token; few sequences run at once, so that all of them decode.
ENDLESS = ("generate", "--max-tokens", "900", "--ignore-eos", "--kv-cache-memory", "64MiB", "--device", "cpu")
ENDLESS += ("--max-num-seqs", "2", *("--prompt", "It was", "--prompt", "The") * 1000)

# A front end: prints "ready"; waits for a line when idle or closing, streams for long when busy.
SCRIPT = """
import sys
from hetis import LLM, SamplingParams

plan, phase, options = sys.argv[1], sys.argv[2], dict(pair.split("=") for pair in sys.argv[3:])
options = {name: float(value) if name == "step_timeout" else value for name, value in options.items()}
llm = LLM(plan=plan, device="cpu", kv_cache_memory="64MiB", **options)
print("ready", flush=True)
if phase == "closing":
    sys.stdin.readline()
    llm.close()
elif phase == "idle":
    sys.stdin.readline()
    llm.generate("It")
else:
    for _ in range(1000):
        for piece in llm.stream(["It"] * 4, SamplingParams(max_tokens=900, ignore_eos=True)):
            print("token", flush=True)
"""


class FleetProcess:
    """A command that runs a fleet. A context manager, which ends all that the command started."""

    def __init__(self, command: Sequence[str], directory: Path, **variables: str) -> None:
        """`directory`: for temporary files, with a path short enough for sockets."""
        self.directory = directory
        environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
        environment |= {"TMPDIR": str(directory), "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
        environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | variables
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in these tests is not for pytest
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()
        self._root = psutil.Process(self.process.pid)
        self._seen: dict[int, psutil.Process] = {}

    @classmethod
    def script(cls, directory: Path, plan: str, phase: str, *options: str, **variables: str) -> "FleetProcess":
        """The front end above."""
        return cls([sys.executable, "-c", SCRIPT, plan, phase, *options], directory, **variables)

    @classmethod
    def torchrun(cls, directory: Path, num_ranks: int, *arguments: str, **variables: str) -> "FleetProcess":
        """`torchrun -m hetis …` on one host."""
        return cls(
            [*torchrun_command("--standalone", "--nproc-per-node", str(num_ranks)), *arguments], directory, **variables
        )

    @staticmethod
    def _read(stream: IO[str], lines: list[str]) -> None:
        """Keeps all lines but the warning that depends on how many cores this machine has."""
        for line in stream:
            if " compete for " not in line:
                lines.append(line.rstrip("\n"))

    # --- members ------------------------------------------------------------------------------------------------------

    def members(self) -> dict[str, psutil.Process]:
        """Living processes by role: "front" (the root), "agent" (its child), "agent 1" …, "driver", "rank 0" …"""
        found: dict[str, psutil.Process] = {}
        for process in family(self._root):
            self._seen[process.pid] = process
            if (seen := look(process)) is not None and (role := role_of(seen)) is not None:
                # a child looks like its parent until it has called exec, and comes after it
                found.setdefault(role, process)
        return found

    def member(self, role: str) -> psutil.Process:
        """The process in this role, as soon as it runs."""
        return self.until(lambda: self.members().get(role), f"a {role} runs")

    def wait_for(self, text: str) -> None:
        """Waits until the front end has printed a line with `text`."""
        self.until(lambda: any(text in line for line in self.out), f"{text!r} is printed")
        self.members()

    def until(self, find: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + DEADLINE
        while not (found := find()):
            assert self.process.poll() is None, f"it ended before {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"not within {DEADLINE:.0f} s: {what}:\n{self.text()}"
            time.sleep(0.02)
        return found

    # --- the end ------------------------------------------------------------------------------------------------------

    def hurt(self, role: str, with_signal: signal.Signals) -> int:
        """Sends a signal to the process in a role; its pid."""
        self.members()
        victim = self.member(role)
        victim.send_signal(with_signal)
        return victim.pid

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def wait(self) -> int:
        """The exit code. All that it started must end as well, before the default time limit of a step ends it.

        These tests do not claim that a fleet ends soon: that depends on other work of the machine.
        """
        deadline = time.monotonic() + END_SECONDS
        try:
            code = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {END_SECONDS} s: {self.members()}\n{self.text()}") from None
        left = psutil.wait_procs(list(self._seen.values()), timeout=max(0.0, deadline - time.monotonic()))[1]
        assert not left, f"orphans after {END_SECONDS} s: {left}\n{self.text()}"
        for reader in self._readers:
            reader.join(DEADLINE)
        return code

    def leftovers(self) -> list[str]:
        """Files and sockets in the temporary directory, without the log directories of torchrun."""
        return [path.name for path in self.directory.iterdir() if not path.name.startswith("torchelastic_")]

    def text(self) -> str:
        return "\n".join([*self.out[-20:], "--- stderr", *self.err[-80:]])

    def __enter__(self) -> "FleetProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.members()
        for process in self._seen.values():
            kill(process)
        self.process.kill()  # nothing if it has ended
        self.process.wait()


def torchrun_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "hetis"]


def role_of(seen: Look) -> str | None:
    """The role of a process in a fleet; None for other processes, and before it has called exec."""
    command, rank = seen.command, seen.variables.get("RANK")
    if "hetis.driver.driver" in command:
        return "driver"
    if "hetis.launch.agent" in command:
        return "agent"
    if "hetis.launch.member" in command:
        return None if rank is None else f"rank {rank}"
    if "torch.distributed.run" in command:
        return "torchrun"
    if "-m hetis" in command and rank is not None:  # a process that torchrun started
        return "front" if rank == "0" else f"agent {rank}"
    return "front" if re.search("-m hetis|import LLM", command) else None
