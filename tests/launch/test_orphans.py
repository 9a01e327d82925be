"""No process of a fleet stays when some are stopped or hang while it is closed, or when a parent is killed."""

import signal
from pathlib import Path

import pytest

from tests.launch.fleet_process import ENDLESS, SHIM, FleetProcess

pytestmark = pytest.mark.process

OPTIONS = ("dispatch=even", "step_timeout=300")  # no silent process counts as dead before the test ends
HANGING = {"PYTHONPATH": str(SHIM), "HANGING_DRIVER": "1"}


def start(directory: Path, phase: str = "closing", **variables: str) -> FleetProcess:
    fleet = FleetProcess.script(directory, "1+1", phase, *OPTIONS, **variables)
    fleet.wait_for("ready")
    return fleet


@pytest.mark.parametrize("stopped", [["rank 0"], ["rank 1"], ["driver"], ["agent"], ["agent", "driver"]])
def test_closing_ends_stopped_processes(directory: Path, stopped: list[str]) -> None:
    with start(directory) as fleet:
        for role in stopped:
            fleet.hurt(role, signal.SIGSTOP)
        fleet.say("close")
        assert fleet.wait() == 0, fleet.text()
        assert fleet.leftovers() == []


@pytest.mark.parametrize("stopped", [[], ["agent"]])
def test_closing_ends_a_driver_that_hangs(directory: Path, stopped: list[str]) -> None:
    with start(directory, **HANGING) as fleet:
        fleet.hurt("driver", signal.SIGUSR1)
        for role in stopped:
            fleet.hurt(role, signal.SIGSTOP)
        fleet.say("close")
        assert fleet.wait() == 0, fleet.text()
        assert fleet.leftovers() == []


@pytest.mark.parametrize("stopped", [["rank 1"], ["driver"], ["agent"], ["agent", "driver", "rank 0", "rank 1"]])
def test_the_end_of_the_front_end_ends_stopped_processes(directory: Path, stopped: list[str]) -> None:
    with start(directory) as fleet:
        for role in stopped:
            fleet.hurt(role, signal.SIGSTOP)
        fleet.hurt("front", signal.SIGKILL)
        assert fleet.wait() == -signal.SIGKILL
        assert fleet.leftovers() == []


def test_the_end_of_the_front_end_ends_a_driver_that_hangs(directory: Path) -> None:
    with start(directory, **HANGING) as fleet:
        fleet.hurt("driver", signal.SIGUSR1)
        fleet.hurt("front", signal.SIGKILL)
        assert fleet.wait() == -signal.SIGKILL
        assert fleet.leftovers() == []


@pytest.mark.parametrize("victim", ["rank 1", "driver"])
def test_the_end_of_the_agent_ends_stopped_processes(directory: Path, victim: str) -> None:
    with start(directory, "busy") as fleet:
        fleet.wait_for("token")
        fleet.hurt(victim, signal.SIGSTOP)
        fleet.hurt("agent", signal.SIGKILL)
        assert fleet.wait() == 1
        assert "the agent, which had started the ranks, was killed by SIGKILL" in fleet.err[-1]
        assert fleet.leftovers() == []


@pytest.mark.parametrize("victim", ["rank 1", "driver", "agent", "agent 1"])
def test_the_end_of_torchrun_ends_stopped_processes(directory: Path, victim: str) -> None:
    command = (*ENDLESS, "--plan", "1+1", "--dispatch", "even", "--step-timeout", "300")
    with FleetProcess.torchrun(directory, 2, *command) as fleet:
        fleet.member("front")
        fleet.wait_for("[0]")
        fleet.hurt(victim, signal.SIGSTOP)
        fleet.hurt("torchrun", signal.SIGKILL)
        assert fleet.wait() == -signal.SIGKILL
        assert fleet.leftovers() == []
