"""Output files: the check leaves no trace, and it refuses what writing would refuse, in the same words."""

import os
import select
from pathlib import Path

import pytest

from hetis.core.files import check_writable, refuse_pipe, write_file


def unwritable(folder: Path) -> list[Path]:
    (folder / "folder").mkdir()
    (folder / "file").write_text("kept")
    long_name = folder / ("x" * 300)
    return [
        folder / "folder",
        folder / "no" / "x.json",
        folder / "file" / "x.json",
        Path("/proc/x"),
        Path(""),
        long_name,
    ]


def test_what_cannot_be_written_is_refused_by_the_check_as_by_writing(tmp_path: Path) -> None:
    paths = unwritable(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for path in paths:
        for attempt in (check_writable, lambda path, what: write_file(path, b"new", what)):
            with pytest.raises(ValueError) as caught:
                attempt(path, "--output")
            assert str(caught.value).startswith(f"--output {path} cannot be written (")
            assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_the_check_changes_nothing(tmp_path: Path) -> None:
    kept, new, link, early = (tmp_path / name for name in ("kept", "new", "link", "early"))
    kept.write_text("kept")
    os.utime(kept, (1, 1))
    link.symlink_to(kept)
    early.symlink_to("new")
    for path in (kept, new, link, early, Path("/dev/null"), Path("/dev/full")):
        check_writable(path, "--output")
    assert (kept.read_text(), kept.stat().st_mtime) == ("kept", 1)
    assert not new.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["early", "kept", "link"]


def test_a_pipe_is_not_opened_by_the_check(tmp_path: Path) -> None:
    """Opening a pipe would block until it has a reader, and closing it would end the reader's input."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_writable(pipe, "--output")
    ends = select.poll()
    ends.register(reader, select.POLLHUP)
    assert ends.poll(0) == [], "a writer has opened and closed the pipe"
    os.close(reader)


@pytest.mark.parametrize("before", ["a longer text than the new one", None])
def test_writing_replaces_and_keeps_links_and_devices(before: str | None, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if before is not None:
        target.write_text(before)
    link.symlink_to(target)
    write_file(link, b"new", "--output")
    assert (target.read_text(), link.is_symlink()) == ("new", True)
    write_file(Path("/dev/null"), b"new", "--output")
    assert not Path("/dev/null").is_file()


def test_a_full_disk_is_a_user_error() -> None:
    with pytest.raises(ValueError, match=r"--output /dev/full cannot be written \(No space left on device\)"):
        write_file(Path("/dev/full"), b"new", "--output")


def test_a_pipe_that_processes_would_share_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=f"^profile .*{name} is a pipe or socket"):
            refuse_pipe(tmp_path / name, "profile")
    for path in (tmp_path / "none", tmp_path, Path("/dev/null"), tmp_path / ("x" * 300)):
        refuse_pipe(path, "profile")  # opening the file reports the error


def test_a_file_of_another_option_is_refused(tmp_path: Path) -> None:
    plan, link, new = tmp_path / "plan.json", tmp_path / "link", tmp_path / "new"
    plan.write_text("{}")
    link.symlink_to(plan)
    for path, others in ((link, ("1+2", str(plan))), (plan, (None, str(plan))), (new, (str(new),))):
        with pytest.raises(ValueError, match="is also the file of another option"):
            check_writable(path, "--output", others)
    check_writable(Path("/dev/null"), "--output", ("/dev/null",))
    check_writable(new, "--output", (None, {"stages": []}, "1+2", str(plan), str(tmp_path / "other")))
    assert plan.read_text() == "{}"
