"""What is refused before a process starts."""

import os
from pathlib import Path

import pytest

from hetis.core.config import EngineConfig
from hetis.launch import checks


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
