"""A front end's hold on a fleet: starts it or attaches to it, sends requests, receives tokens, ends it."""

import os
import shutil
import subprocess
import weakref
from pathlib import Path

from hetis.comm.control import ControlClient
from hetis.core import messages as m
from hetis.core.config import EngineConfig
from hetis.server import launch

SHUTDOWN_SECONDS = 4.0
POLL_SECONDS = 0.2


class EngineDeadError(RuntimeError):
    """The fleet is gone; the message says which rank on which device, and why."""


class EngineClient:
    """One fleet. Not thread-safe: one thread sends and receives."""

    def __init__(self, config: EngineConfig, world_size: int) -> None:
        """Starts `world_size` ranks on this host, or, as the front end under torchrun, attaches to those that run.

        Returns at once: `wait_until_ready` waits for the fleet.
        """
        self._launcher: subprocess.Popen[bytes] | None = None
        if launch.FRONT_VARIABLE in os.environ:
            self._directory = Path(os.environ[launch.FRONT_VARIABLE])
        else:
            self._directory = launch.make_run_directory()
            self._launcher = launch.start_launcher(config, self._directory, world_size)
        self._control = ControlClient(f"ipc://{self._directory / 'front'}", f"front-{os.getpid()}", "front")
        self._finalizer = weakref.finalize(self, _close, self._control, self._launcher, self._directory)
        self._control.send(m.Attach())

    def wait_until_ready(self) -> m.EngineReady:
        message = self.receive()
        assert isinstance(message, m.EngineReady)
        return message

    def send(self, message: m.Message) -> None:
        self._control.send(message)

    def receive(self) -> m.Message:
        """The next message; EngineDeadError when the fleet has failed."""
        while True:
            message: m.Message | None = self._control.receive(POLL_SECONDS)
            if isinstance(message, m.EngineDead):
                self.close()
                raise EngineDeadError(message.reason)
            if message is not None:
                return message
            self._check_launcher()

    def _check_launcher(self) -> None:
        if self._launcher is None or self._launcher.poll() is None:
            return
        verdict = self._directory / launch.VERDICT
        reason = (
            verdict.read_text() if verdict.exists() else f"the launcher ended with code {self._launcher.returncode}."
        )
        self.close()
        raise EngineDeadError(reason)

    def close(self) -> None:
        """Ends the fleet; it has some seconds to do so in order. Harmless when called again."""
        self._finalizer()


def _close(control: ControlClient, launcher: "subprocess.Popen[bytes] | None", directory: Path) -> None:
    control.send(m.Shutdown())
    control.close()
    if launcher is None:  # under torchrun the ranks and the directory belong to rank 0
        return
    try:
        launcher.wait(SHUTDOWN_SECONDS)
    except subprocess.TimeoutExpired:
        launcher.kill()  # its ranks die with it
        launcher.wait()
    assert launcher.stdin is not None
    launcher.stdin.close()
    shutil.rmtree(directory, ignore_errors=True)
