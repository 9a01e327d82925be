"""A fleet in processes of its own, to be watched and hurt: who runs, what was said, what is left over."""

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

ROOT = Path(__file__).parent.parent.parent
SHIM = Path(__file__).parent / "shim"
DEADLINE = 60.0  # seconds, for whatever should happen soon; a loaded machine is slow

# A front end: says where it is, waits for a word when idle, streams for long when busy.
SCRIPT = """
import sys
from hetis import LLM, SamplingParams

plan, phase, options = sys.argv[1], sys.argv[2], dict(pair.split("=") for pair in sys.argv[3:])
options = {name: float(value) if name == "step_timeout" else value for name, value in options.items()}
llm = LLM(plan=plan, device="cpu", kv_cache_memory="64MiB", **options)
print("ready", flush=True)
if phase == "idle":
    sys.stdin.readline()
    llm.generate("It")
else:
    for _ in range(1000):
        for piece in llm.stream(["It"] * 4, SamplingParams(max_tokens=900, ignore_eos=True)):
            print("token", flush=True)
"""


class FleetProcess:
    """A command that runs a fleet. A context manager; at its end nothing that it started is left."""

    def __init__(self, command: Sequence[str], directory: Path, **variables: str) -> None:
        """`directory`: for temporary files; it must be empty in the end, and its path short (it holds sockets)."""
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
        for line in stream:
            lines.append(line.rstrip("\n"))

    # --- who runs -----------------------------------------------------------------------------------------------------

    def members(self) -> dict[str, psutil.Process]:
        """By role: "front", "launcher", "torchrun", "driver", "rank 0" … of those that live."""
        found = {}
        for process in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            try:
                role = _role(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
            self._seen[process.pid] = process
            if role is not None:
                found[role] = process
        return found

    def member(self, role: str) -> psutil.Process:
        """The process in this role, as soon as it is there."""
        return self.until(lambda: self.members().get(role), f"there is a {role}")

    def wait_for(self, text: str) -> None:
        """Until the front end has printed a line with `text`."""
        self.until(lambda: any(text in line for line in self.out), f"{text!r} is printed")
        self.members()

    def until(self, look: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + DEADLINE
        while not (found := look()):
            assert self.process.poll() is None, f"it ended before {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"not within {DEADLINE:.0f} s: {what}:\n{self.text()}"
            time.sleep(0.02)
        return found

    # --- the end ------------------------------------------------------------------------------------------------------

    def hurt(self, role: str, with_signal: signal.Signals) -> int:
        """The pid of whom it hit."""
        self.members()
        pid = self.member(role).pid
        os.kill(pid, with_signal)
        return pid

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def wait(self, seconds: float) -> int:
        """The exit code, which must come within `seconds`; everything it started must end in that time, too."""
        deadline = time.monotonic() + seconds
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s: {self.members()}\n{self.text()}") from None
        left = psutil.wait_procs(list(self._seen.values()), timeout=max(0.0, deadline - time.monotonic()))[1]
        assert not left, f"orphans after {seconds} s: {left}\n{self.text()}"
        for reader in self._readers:
            reader.join(DEADLINE)
        return code

    def leftovers(self) -> list[str]:
        """Files and sockets in the temporary directory; torchrun's own log directories are not ours."""
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
            if process.is_running():
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def torchrun_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "hetis"]


def _role(process: psutil.Process) -> str | None:
    command, variables = " ".join(process.cmdline()), process.environ()
    if "hetis.engine.driver" in command:
        return "driver"
    if "hetis.server.local_launcher" in command:
        return f"rank {variables['RANK']}" if command.endswith(" rank") else "launcher"
    if "torch.distributed.run" in command:
        return "torchrun"
    if "-m hetis" in command and "HETIS_FRONT" not in variables and "RANK" in variables:
        return f"rank {variables['RANK']}"
    return "front" if re.search("-m hetis|import LLM", command) else None
