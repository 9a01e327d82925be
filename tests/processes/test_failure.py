"""The record of a failure reason, and how ends of processes are worded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hetis.core.plan_sources import resolve_plan
from hetis.processes import failure, supervision
from hetis.processes.failure import FailureReason, FailureRecord
from tests.dispatcher.fleets import make_spec


def test_the_first_reason_stays(tmp_path: Path) -> None:
    first, second = FailureReason("one", refused=True), FailureReason("two")
    record = FailureRecord(tmp_path)
    assert record.read() is None
    record.write(first)
    record.write(second)
    assert record.read() == FailureRecord(tmp_path).read() == first
    assert [path.name for path in tmp_path.iterdir()] == ["failure"]


def test_a_run_directory_that_has_been_removed_is_no_error(tmp_path: Path) -> None:
    FailureRecord(tmp_path / "removed").write(FailureReason("one"))
    assert FailureRecord(tmp_path / "removed").read() is None


def test_the_first_report_to_torchrun_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    failure.report_to_torchrun("one")
    failure.report_to_torchrun("two")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "one"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    failure.report_to_torchrun("no torchrun, no file")
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


def test_members_are_named_by_rank_role_and_device() -> None:
    plan = resolve_plan("1+1", make_spec(4), "cuda")
    assert failure.member_name(plan, 0) == "rank 0 (primary on cuda)"
    assert failure.member_name(plan, 1, "cuda:3") == "rank 1 (attention worker on cuda:3)"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (9, "was killed by SIGKILL"),
        (15, "was killed by SIGTERM"),
        (6, "was killed by SIGABRT"),
        (40, "was killed by signal 40"),  # Python has no name for it
    ],
)
def test_ends_by_signal(number: int, words: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert supervision.wait_status(process.pid) is None
    process.send_signal(number)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    status = supervision.wait_status(process.pid)
    assert words in failure.describe_end(status) == failure.end_of(process.pid)
    process.communicate()


def test_ends_by_code() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert failure.end_of(process.pid) == "exited with code 3"
    process.wait()
    assert "without giving a reason" in failure.end_of(process.pid)
