"""A front end's hold on a fleet: starts it or attaches to it, sends requests, receives tokens, ends it."""

import os
import shutil
import signal
import subprocess
import weakref
from contextlib import ExitStack
from pathlib import Path

from hetis.comm import supervision
from hetis.comm.control import ControlClient
from hetis.core import messages as m
from hetis.core.config import EngineConfig
from hetis.core.plan import Plan
from hetis.server.launch import FRONT_VARIABLE, make_run_directory
from hetis.server.local_launcher import start_launcher
from hetis.server.progress import ProgressBar, progress_bar

CLOSE_SECONDS = 4.0  # more than the launcher takes for all that it started
POLL_SECONDS = 0.2


class EngineDeadError(RuntimeError):
    """The fleet is gone; the message says which rank on which device, and why."""


class FleetRefusedError(EngineDeadError, ValueError):
    """The fleet ended because it cannot be what was asked for."""


class EngineClient:
    """One fleet. Not thread-safe: one thread sends and receives."""

    def __init__(self, config: EngineConfig, plan: Plan) -> None:
        """Starts the ranks on this host, or, as the front end under torchrun, attaches to those that run.

        Returns at once: `wait_until_ready` waits for the fleet.
        """
        self._launcher: subprocess.Popen[bytes] | None = None
        self._reason, self._progress = "the fleet has been closed.", config.progress
        if FRONT_VARIABLE in os.environ:
            self._directory = Path(os.environ[FRONT_VARIABLE])
        else:
            self._directory = make_run_directory()
            self._launcher = start_launcher(config, plan, self._directory)
        self._control = ControlClient(f"ipc://{self._directory / 'front'}", f"front-{os.getpid()}", "front")
        self._finalizer = weakref.finalize(self, _close, self._control, self._launcher, self._directory)
        self._control.send(m.Attach())

    @property
    def is_open(self) -> bool:
        """Whether there is a fleet to talk to, as far as this end knows."""
        return self._finalizer.alive

    def wait_until_ready(self) -> m.EngineReady:
        """EngineDeadError when the fleet fails, FleetRefusedError when it cannot be what was asked for.

        Shows how far measuring is, on a terminal.
        """
        with _MeasuringBar(self._progress) as bar:
            while isinstance(message := self.receive(), m.Measuring):
                bar.follow(message)
        assert isinstance(message, m.EngineReady)
        return message

    def send(self, message: m.Message) -> None:
        """EngineDeadError when the fleet has failed, or has been closed."""
        if not self.is_open:
            raise EngineDeadError(self._reason)
        self._control.send(message)

    def receive(self) -> m.Message:
        """The next message; EngineDeadError when there will be none."""
        while True:
            message = self.poll(POLL_SECONDS)
            if message is not None:
                return message

    def poll(self, seconds: float) -> m.Message | None:
        """The next message, None if there is none within `seconds`; EngineDeadError when there will be none."""
        if self.is_open:
            message: m.Message | None = self._control.receive(seconds)
            if isinstance(message, m.EngineDead) or (message is None and self._has_ended()):
                self._give_up(message.reason if message else "the fleet ended without a word.")
            else:
                return message
        raise EngineDeadError(self._reason)

    def _has_ended(self) -> bool:
        if self._launcher is None:
            return self._control.is_lost
        return self._launcher.poll() is not None

    def _give_up(self, reason: str) -> None:
        """Ends what is left, and raises the best explanation there is."""
        code = self._launcher.poll() if self._launcher is not None else None
        verdict = supervision.read_verdict(self._directory)
        if code is not None and code < 0:  # and the ranks with it
            reason = f"the launcher of the ranks was killed by {signal.Signals(-code).name}."
        elif verdict is not None:
            reason = verdict.reason
        self._reason = reason
        self.close()
        if verdict is not None and verdict.refused:
            raise FleetRefusedError(reason)

    def close(self) -> None:
        """Ends the fleet; it has some seconds to do so in order. Harmless when called again."""
        self._finalizer()


class _MeasuringBar(ExitStack):
    """How far measuring is, from the first message about it to the end of the block."""

    def __init__(self, show: bool) -> None:
        super().__init__()
        self._show, self._done = show, 0
        self._bar: ProgressBar | None = None

    def follow(self, news: m.Measuring) -> None:
        if self._bar is None:
            self._bar = self.enter_context(progress_bar("measuring devices and links", news.total, show=self._show))
        self._bar.advance(news.done - self._done)
        self._done = news.done


def _close(control: ControlClient, launcher: "subprocess.Popen[bytes] | None", directory: Path) -> None:
    control.send(m.Shutdown())
    if launcher is None:  # under torchrun the ranks and the directory belong to rank 0
        control.close()
        return
    assert launcher.stdin is not None
    launcher.stdin.close()  # it allows the ranks some seconds for the message above
    try:
        launcher.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        launcher.kill()  # its ranks die with it
        launcher.wait()
    control.close(linger=0)
    shutil.rmtree(directory, ignore_errors=True)
