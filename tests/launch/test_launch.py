"""What is refused before a process starts, and what a rank does before it imports torch."""

import os
import signal
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hetis.core.config import EngineConfig
from hetis.launch import checks, member
from hetis.processes import start


def test_the_environment_of_a_rank_is_set_before_torch_and_the_users_own_values_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CUDA reads the number of hardware queues when it is first used, so later is too late."""
    environment: dict[str, str] = {}

    def stop(*_: Any, **__: Any) -> NoReturn:  # instead of the last call before the import
        environment.update(os.environ)
        raise SystemExit

    monkeypatch.setattr(member, "Children", stop)
    monkeypatch.setattr(start, "begin", lambda parent: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "OMP_WAIT_POLICY": "ACTIVE"}.items():
        monkeypatch.setenv(name, value)
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.setenv(name, "")  # so that pytest restores them
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit):
        member.run_member(EngineConfig(model=None), run_directory=tmp_path)
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert environment["THP_MEM_ALLOC_ENABLE"] == "1"
    assert environment["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("option", ["profile", "trace"])
def test_unusable_files_are_refused_before_a_process_starts(option: str, tmp_path: Path) -> None:
    """Both stay as they are."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "plan.json").write_text('{"stages": [{"primaries": [{}]}]}')
    wrong = {
        "pipe": "is a pipe or socket",
        "nowhere/file": r"\(No such file or directory\)",
        "plan.json": "is also the file of another option" if option == "trace" else "`hetis profile` wrote",
    }
    for name, words in wrong.items():
        config = EngineConfig(plan=str(tmp_path / "plan.json"), device="cpu", **{option: str(tmp_path / name)})
        with pytest.raises(ValueError, match=words):
            checks.plan_for(config)
    assert (tmp_path / "plan.json").read_text() == '{"stages": [{"primaries": [{}]}]}'
