"""The end of any process ends the job, with the reason in the last line, and leaves neither processes nor files."""

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launch.fleet_process import ENDLESS, SHIM, FleetProcess

pytestmark = pytest.mark.process
STEP_TIMEOUT = 10.0

# so that every rank gets lanes: otherwise the small model would stay on the primary
EVEN = "dispatch=even"
NAMES = {"rank 0": "rank 0 (primary on cpu)", "rank 1": "rank 1 (attention worker on cpu)", "driver": "the driver"}
SILENT = ("--log-level", "error")
EVEN_OPTION = ("--dispatch", "even")  # the same on the command line


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "hetis" in name}


def check_end(fleet: FleetProcess, *words: str) -> None:
    """All processes ended, badly, and the last line has all `words`."""
    code = fleet.wait()
    assert code != 0
    last = reason(fleet)
    assert all(word in last for word in words), f"{words} are not all in {last!r}:\n{fleet.text()}"
    assert fleet.leftovers() == []
    assert not shared_memory()


def reason(fleet: FleetProcess) -> str:
    """The last line of stderr; under torchrun the one before its report."""
    ours = [
        line
        for line in fleet.err
        if line.startswith("hetis: ") or "EngineDeadError: " in line or "RefusedError: " in line
    ]
    assert ours, fleet.text()
    return ours[-1] if any("ChildFailedError" in line for line in fleet.err) else fleet.err[-1]


def start_busy(directory: Path, plan: str = "1+1", *options: str) -> FleetProcess:
    fleet = FleetProcess.script(directory, plan, "busy", EVEN, *options)
    fleet.wait_for("token")
    return fleet


def start_idle(directory: Path, plan: str = "1+1", *options: str) -> FleetProcess:
    fleet = FleetProcess.script(directory, plan, "idle", EVEN, *options)
    fleet.wait_for("ready")
    return fleet


# --- under LLM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "driver", "agent"])
def test_a_killed_process_takes_a_busy_fleet_down(directory: Path, victim: str) -> None:
    with start_busy(directory) as fleet:
        fleet.hurt(victim, signal.SIGKILL)
        check_end(fleet, NAMES.get(victim, "the agent"), "was killed by SIGKILL")


@pytest.mark.parametrize("victim", ["rank 1", "driver"])
def test_a_killed_process_takes_an_idle_fleet_down(directory: Path, victim: str) -> None:
    with start_idle(directory) as fleet:
        fleet.hurt(victim, signal.SIGKILL)
        ranks = [process for role, process in fleet.members().items() if role.startswith("rank")]
        fleet.until(lambda: not any(process.is_running() for process in ranks), "the ranks have ended")
        fleet.say("go on")  # the user's process gets the error when it uses the fleet
        check_end(fleet, NAMES[victim], "was killed by SIGKILL")


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "agent"])
def test_a_killed_process_takes_a_loading_fleet_down(directory: Path, victim: str) -> None:
    with FleetProcess.script(directory, "1+2", "idle") as fleet:
        fleet.member("driver")
        if victim != "agent":
            fleet.hurt("rank 2", signal.SIGSTOP)  # it never joins, so the others wait
        fleet.hurt(victim, signal.SIGKILL)
        check_end(fleet, NAMES.get(victim, "the agent"), "was killed by SIGKILL")


def test_a_front_end_that_is_killed_leaves_nothing(directory: Path) -> None:
    with start_busy(directory) as fleet:
        fleet.hurt("front", signal.SIGKILL)
        assert fleet.wait() == -signal.SIGKILL
        assert fleet.leftovers() == []


@pytest.mark.parametrize("when", ["loading", "measuring", "step"])
def test_a_rank_that_raises_shows_its_traceback(directory: Path, when: str) -> None:
    variables = {"PYTHONPATH": str(SHIM), "FAILING_RANK": f"1:{when}"}
    with FleetProcess.script(directory, "1+1", "busy", **variables) as fleet:
        check_end(fleet, NAMES["rank 1"], "MemoryError: planted failure")
        tracebacks = [line for line in fleet.err if line.startswith("Traceback")]
        assert "ERROR hetis rank 1: failed on cpu" in fleet.err[0]
        assert fleet.err[1] == tracebacks[0]


def test_a_rank_that_stops_while_it_measures_is_found(directory: Path) -> None:
    variables = {"PYTHONPATH": str(SHIM), "FAILING_RANK": "1:stopping"}
    with FleetProcess.script(directory, "1+1", "idle", f"step_timeout={STEP_TIMEOUT}", **variables) as fleet:
        check_end(fleet, NAMES["rank 1"], f"did not answer within --step-timeout ({STEP_TIMEOUT:g} s)")


@pytest.mark.parametrize(
    ("victim", "phase"),
    [
        ("rank 1", "busy"),
        ("rank 1", "idle"),
        ("driver", "busy"),
        ("driver", "idle"),
    ],
)
def test_a_stopped_process_is_named_after_the_step_timeout(directory: Path, victim: str, phase: str) -> None:
    start = start_busy if phase == "busy" else start_idle
    with start(directory, "1+1", f"step_timeout={STEP_TIMEOUT}") as fleet:
        fleet.hurt(victim, signal.SIGSTOP)
        if phase == "idle":
            fleet.say("go on")
        check_end(fleet, NAMES[victim], "stopped")


def test_another_primary_that_is_killed_is_named(directory: Path) -> None:
    with start_busy(directory, "2+1") as fleet:
        fleet.hurt("rank 1", signal.SIGKILL)
        check_end(fleet, "rank 1 (primary on cpu)", "was killed by SIGKILL")


def test_a_mistake_that_only_a_rank_can_see_is_one_sentence(directory: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"stages": [{"primaries": [{}]}], "attention": [{"device": "cuda:99"}]}')
    with FleetProcess.script(directory, str(plan), "idle") as fleet:
        check_end(fleet, "FleetRefusedError: ", "device cuda:99 does not exist")
        assert not any("rank" in line for line in fleet.err), "ranks show no traceback of a user's mistake"


# --- under torchrun ---------------------------------------------------------------------------------------------------


def start_torchrun(directory: Path, plan: str = "1+1", num_ranks: int = 2, **variables: str) -> FleetProcess:
    options = (*ENDLESS, *SILENT, *EVEN_OPTION, "--plan", plan, "--step-timeout", str(STEP_TIMEOUT))
    return FleetProcess.torchrun(directory, num_ranks, *options, **variables)


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "driver", "agent"])
def test_under_torchrun_a_killed_process_takes_a_busy_fleet_down(directory: Path, victim: str) -> None:
    with start_torchrun(directory) as fleet:
        fleet.wait_for("[0]")
        fleet.hurt(victim, signal.SIGKILL)
        check_end(fleet, NAMES.get(victim, "the agent"), "was killed by SIGKILL")


def test_a_killed_agent_of_torchrun_takes_the_fleet_down(directory: Path) -> None:
    """Its rank dies with it, unseen by an agent; the other rank says that the process ended, perhaps "killed"."""
    with start_torchrun(directory) as fleet:
        fleet.wait_for("[0]")
        fleet.hurt("agent 1", signal.SIGKILL)
        check_end(fleet, "rank 1 (")


def test_a_killed_root_takes_the_fleet_of_torchrun_down(directory: Path) -> None:
    """torchrun has started it, and names it."""
    with start_torchrun(directory) as fleet:
        fleet.wait_for("[0]")
        pid = fleet.hurt("front", signal.SIGKILL)
        assert fleet.wait() != 0
        assert any(f"Signal 9 (SIGKILL) received by PID {pid}" in line for line in fleet.err), fleet.text()
        assert fleet.leftovers() == []


@pytest.mark.parametrize("asked", ["front", "agent 1"])
def test_a_launchers_request_to_end_ends_the_command(directory: Path, asked: str) -> None:
    with start_torchrun(directory) as fleet:
        fleet.wait_for("[0]")
        fleet.hurt(asked, signal.SIGTERM)
        check_end(fleet, NAMES["rank 0" if asked == "front" else "rank 1"], "was asked to end by its launcher")


def test_under_torchrun_a_killed_process_takes_a_loading_fleet_down(directory: Path) -> None:
    with start_torchrun(directory, "1+2", 3) as fleet:
        fleet.until(lambda: list(directory.glob("hetis-*/ranks")), "the driver listens")
        fleet.hurt("rank 2", signal.SIGKILL)
        check_end(fleet, "rank 2 (attention worker on cpu)")


def test_under_torchrun_its_own_summary_has_the_reason(directory: Path) -> None:
    with start_torchrun(directory, PYTHONPATH=str(SHIM), FAILING_RANK="1:step") as fleet:
        check_end(fleet, NAMES["rank 1"], "MemoryError: planted failure")
        root_cause = fleet.err[max(i for i, line in enumerate(fleet.err) if "Root Cause" in line) :]
        assert any("MemoryError: planted failure" in line for line in root_cause), fleet.text()


@pytest.mark.parametrize("victim", ["rank 1", "driver"])
def test_under_torchrun_a_stopped_process_is_named(directory: Path, victim: str) -> None:
    with start_torchrun(directory) as fleet:
        fleet.wait_for("[0]")
        fleet.hurt(victim, signal.SIGSTOP)
        check_end(fleet, NAMES[victim], "stopped")


def test_killing_torchrun_leaves_nothing(directory: Path) -> None:
    with start_torchrun(directory) as fleet:
        fleet.wait_for("[0]")
        fleet.hurt("torchrun", signal.SIGKILL)
        assert fleet.wait() == -signal.SIGKILL
        assert fleet.leftovers() == []


# --- Ctrl-C, many at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["busy", "idle", "loading"])
def test_ctrl_c_ends_everything(directory: Path, phase: str) -> None:
    with FleetProcess.script(directory, "1+1", phase) as fleet:
        if phase == "loading":
            fleet.until(lambda: list(directory.glob("hetis-*/ranks")), "the driver listens")
        else:
            fleet.wait_for("token" if phase == "busy" else "ready")
        fleet.hurt("front", signal.SIGINT)
        assert fleet.wait() == -signal.SIGINT  # as Python ends a script on Ctrl-C; shells say 130
        assert "KeyboardInterrupt" in fleet.err[-1]
        assert fleet.leftovers() == []


def test_ctrl_c_ends_the_command_line(directory: Path) -> None:
    with FleetProcess([sys.executable, "-m", "hetis", *ENDLESS, *SILENT, "--plan", "1+1"], directory) as fleet:
        fleet.wait_for("[0]")
        fleet.hurt("front", signal.SIGINT)
        assert fleet.wait() == 130
        assert fleet.err == []
        assert fleet.leftovers() == []


def test_ctrl_c_ends_everything_under_torchrun(directory: Path) -> None:
    with start_torchrun(directory) as fleet:
        fleet.wait_for("[0]")
        fleet.members()
        os.killpg(fleet.process.pid, signal.SIGINT)  # as a terminal does
        assert fleet.wait() != 0
        assert not [line for line in fleet.err if line.startswith("hetis: ")], "nothing failed"
        assert fleet.leftovers() == []


@pytest.mark.parametrize("count", [3, 8])
def test_many_fleets_start_at_once(directory: Path, count: int) -> None:
    fleets = [FleetProcess.script(directory, "1+0", "idle") for _ in range(count)]
    with ExitStack() as stack:
        for fleet in fleets:
            stack.enter_context(fleet)
        for fleet in fleets:
            fleet.wait_for("ready")
        for fleet in fleets:
            fleet.say("go on")
        assert [fleet.wait() for fleet in fleets] == [0] * count
    assert os.listdir(directory) == []
