"""Child processes of rank 0: the driver and, under torchrun, the front end."""

import os
import shutil
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from hetis.core.config import DriverArgs, EngineConfig, Joining
from hetis.driver import final_status
from hetis.launch import torchrun
from hetis.launch.checks import end_of_sequence_ids, plan_for
from hetis.launch.run_directory import make_run_directory
from hetis.models.weight_files import with_own_head
from hetis.processes import start, supervision
from hetis.processes.failure import FailureReason, FailureRecord, describe_end, report_to_torchrun

_END_SECONDS = 0.5  # that this rank has to end after the driver, when the job ends in order


class Children:
    """The driver and, under torchrun, the front end: watched by rank 0, and ended with it."""

    def __init__(
        self, config: EngineConfig, *, measure: bool, front_argv: list[str] | None, run_directory: Path | None
    ) -> None:
        """Starts both. Raises ValueError for settings that do not fit together. The arguments are `run_member`'s."""
        self._args = _driver_args(config, measure, run_directory, announce=front_argv is not None)
        self._record = FailureRecord(self._args.run_directory, prints=self._args.announce)
        self._ending = threading.Lock()
        # Launchers end whole process groups. These two end when rank 0 wants it: the driver has to explain the end, and
        # the front end has to show the explanation and what was computed before.
        with supervision.hold(signal.SIGTERM, signal.SIGINT):
            self._driver = self._start_driver()
            signal.signal(signal.SIGTERM, self._on_early_end)  # until the rank's heartbeat takes over
        with supervision.hold(signal.SIGTERM):  # Ctrl-C is for the front end
            self._front = None if front_argv is None else self._start_front(front_argv)
        threading.Thread(target=self._watch_driver, daemon=True).start()

    def _start_driver(self) -> "subprocess.Popen[bytes]":
        driver = subprocess.Popen(
            start.command("hetis.driver.driver"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=start.environment(),
        )
        assert driver.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `_watch_driver` notices
            driver.stdin.write(msgspec.json.encode(self._args) + b"\n")
            driver.stdin.flush()
        return driver

    def _start_front(self, argv: list[str]) -> "subprocess.Popen[bytes]":
        command = start.command("hetis.launch.front_end", self._args.run_directory, str(os.getpid()), *argv)
        front = subprocess.Popen(command, env=torchrun.without_torchrun(start.environment()))
        threading.Thread(target=self._watch_front, args=(front,), daemon=True).start()
        return front

    def joining(self) -> bytes:
        """`Joining`, encoded, as soon as the driver listens."""
        assert self._driver.stdout is not None
        line = self._driver.stdout.readline()
        if not line:
            self.on_lost_driver("ended")
        return msgspec.json.encode(msgspec.json.decode(line, type=Joining))

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _watch_front(self, front: "subprocess.Popen[bytes]") -> None:
        """When the front end ends, for whatever reason, the driver shuts down."""
        code = front.wait()
        if code < 0 and -code != signal.SIGINT:
            self._fail(f"the front end (child of rank 0) {describe_end(-code)}.")
        self._write_to_driver(final_status.SHUT_DOWN)

    def _watch_driver(self) -> None:
        """When the driver ends, so does this rank. In order it ends first: then this rank has a moment left."""
        if self._driver.wait() == 0:
            threading.Event().wait(_END_SECONDS)
        self.on_lost_driver("ended")

    def _write_to_driver(self, line: bytes) -> None:
        assert self._driver.stdin is not None
        with suppress(BrokenPipeError):
            self._driver.stdin.write(line)
            self._driver.stdin.flush()

    def _on_early_end(self, *_: object) -> None:
        """The launcher ends this rank before it has joined. The driver cannot see that from its wait status."""
        self._write_to_driver(final_status.ASKED_TO_END)
        os._exit(128 + signal.SIGTERM)

    def on_lost_driver(self, how: str) -> NoReturn:
        """Ends this rank, and the driver if it still runs. Two threads may call this; the first one acts."""
        self._ending.acquire()
        if how != "ended":
            supervision.kill([self._driver.pid])
            self._fail(f"the driver (child of rank 0, pid {self._driver.pid}) {how}.")
        code = self._driver.wait()
        if code < 0:
            self._fail(f"the driver (child of rank 0) {describe_end(-code)}.")
        reason = self._record.read()
        if reason is not None:
            report_to_torchrun(reason.text)
        os._exit(self.wait())

    def _fail(self, text: str) -> None:
        """Records what the driver cannot report."""
        self._record.write(FailureReason(text))

    def wait(self) -> int:
        """Waits for the driver, and for the front end if it has ended the job; the exit code of the job."""
        code = self._driver.wait()
        if self._front is not None:
            if code == 0:
                code = self._front.wait()
            shutil.rmtree(self._args.run_directory, ignore_errors=True)  # else it belongs to the front end
        return code if code >= 0 else 128 - code


def _driver_args(config: EngineConfig, measure: bool, run_directory: Path | None, announce: bool) -> DriverArgs:
    directory, spec, plan = plan_for(config)
    torchrun.check_world_size(plan)
    if config.load_format != "dummy":
        spec = with_own_head(spec, directory)
    many_hosts = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    return DriverArgs(
        config=config,
        measure=measure,
        spec=spec,
        plan=plan,
        eos_token_ids=end_of_sequence_ids(config, directory, spec.vocab_size),
        run_directory=str(run_directory or make_run_directory()),
        address=torchrun.own_address() if many_hosts else None,
        announce=announce,
        parent=os.getpid(),
    )
