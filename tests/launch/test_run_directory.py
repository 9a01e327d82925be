"""Where the private directory of a run is made."""

import os
import tempfile
from pathlib import Path

import pytest

from hetis.launch import run_directory


@pytest.mark.parametrize(
    ("runtime", "temporary", "expected"),
    [
        ("run", "tmp", "run"),
        (None, "tmp", "tmp"),
        ("missing", "tmp", "tmp"),
        ("file", "tmp", "tmp"),
        ("long" * 30, "tmp", "tmp"),
        ("", "tmp", "tmp"),
    ],
)
def test_the_first_place_that_can_hold_sockets_is_used(
    monkeypatch: pytest.MonkeyPatch, runtime: str | None, temporary: str, expected: str
) -> None:
    with tempfile.TemporaryDirectory(prefix="t") as name:
        root = Path(name)
        for folder in ("run", "tmp", "long" * 30):
            (root / folder).mkdir()
        (root / "file").touch()
        monkeypatch.setenv("TMPDIR", str(root / temporary))
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        if runtime is not None:
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(root / runtime) if runtime else "")
        made = run_directory.make_run_directory()
        assert made.parent == root / expected
        assert made.stat().st_mode & 0o777 == 0o700
        assert len(os.fsencode(made / "health")) <= 107


def test_relative_places_are_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes that use the sockets may have another working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", ".")
    monkeypatch.setenv("TMPDIR", ".")
    made = run_directory.make_run_directory()
    assert made.is_absolute()
    assert made.parent != tmp_path
    made.rmdir()


def test_a_file_system_without_sockets_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="t") as first, tempfile.TemporaryDirectory(prefix="t") as second:
        monkeypatch.setenv("XDG_RUNTIME_DIR", first)
        monkeypatch.setenv("TMPDIR", second)
        bind = run_directory.holds_sockets
        monkeypatch.setattr(run_directory, "holds_sockets", lambda path: path.parent != Path(first) and bind(path))
        made = run_directory.make_run_directory()
        assert made.parent == Path(second)
        assert list(made.iterdir()) == list(Path(first).iterdir()) == []


def test_no_place_for_sockets_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with pytest.raises(ValueError, match=r"no place for the sockets.*/nowhere, /tmp, /var/tmp, /dev/shm.*TMPDIR"):
        run_directory.make_run_directory()
