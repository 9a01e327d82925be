"""How processes of a fleet start: their path, their descriptors, and their working directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hetis.processes import start

BEGIN = "from hetis.processes import start; start.begin(); "


def python(code: str, shell: str = "", cwd: Path | None = None, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Runs `code` with redirections and commands of `shell` before it."""
    command = ["bash", "-c", f'{shell} exec "$0" -P -c "$1"', sys.executable, code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | variables)


def test_nothing_is_imported_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "shadow.py").write_text("print('shadowed')")
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "hetis").mkdir()
    search = [sys.executable, "-m", "shadow"]
    assert subprocess.run(search, cwd=tmp_path, check=True, capture_output=True).stdout == b"shadowed\n"
    command = start.command("shadow")
    assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 1
    done = subprocess.run(start.command("hetis", "--help"), cwd=tmp_path, check=True, capture_output=True)
    assert b"generate" in done.stdout


def test_a_child_imports_from_where_its_parents_interpreter_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start.command("a", "b", "c")[1:] == ["-P", "-m", "a", "b", "c"]
    printed = subprocess.run(
        [sys.executable, "-E", "-s", "-c", "from hetis.processes import start; print(*start.command('a')[1:])"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert printed == "-P -E -s -m a\n"
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(ValueError, match=r"sys\.executable"):
        start.command("a")


@pytest.mark.parametrize(
    ("before", "after"), [("/a:/b", "/a:/b"), (":/a", "/a"), ("/a:", "/a"), ("/a::/b", "/a:/b"), (".:/a", ".:/a")]
)
def test_empty_entries_are_removed_from_the_path(monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    monkeypatch.setenv("PYTHONPATH", before)
    assert start.environment() == os.environ | {"PYTHONPATH": after}


def test_python_m_hetis_imports_nothing_from_the_working_directory(tmp_path: Path) -> None:
    """What runpy itself imports before the package is out of reach."""
    for name in ("typing", "json", "random", "argparse", "socket", "tempfile", "msgspec", "zmq", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    command = [sys.executable, "-m", "hetis", "generate", "--help"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    gone = tmp_path / "gone"
    done = python("import runpy, sys; sys.argv = ['-m', '--help']; runpy.run_module('hetis', run_name='__main__')",
                  f"mkdir {gone}; cd {gone}; rmdir {gone};")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_descriptors_that_the_shell_closed_are_there(tmp_path: Path, closed: str) -> None:
    """A file that is opened gets a number of its own, and children have the descriptors, too."""
    code = (
        f"{BEGIN}import os, subprocess, sys; file = open('x', 'w'); print('said'); sys.stdin.read(0);"
        "print(file.fileno() > 2, os.get_inheritable(0), os.get_inheritable(1), os.get_inheritable(2), file=file);"
        "sys.stderr.write('said'); file.flush(); sys.exit(subprocess.call(['true']))"
    )
    done = python(code, f"exec {closed};", tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "x").read_text() == "True True True True\n"
    assert done.stdout == ("" if ">&-" in closed.split() else "said\n")


@pytest.mark.parametrize("sink", ["2> /dev/full", "2> >(:)"])
def test_a_process_outlives_messages_that_cannot_be_written(sink: str) -> None:
    code = (
        f"{BEGIN}import sys, time, logging; print('ü' * 100000, file=sys.stderr, flush=True); logging.error('x');"
        "sys.stderr.flush(); print('alive')"
    )
    done = python(code, f"exec {sink}; sleep 0.2;")
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_messages_are_written_whatever_the_encoding() -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
    done = python(f"{BEGIN}import sys; print('\\xfc \\u4f60', file=sys.stderr)", **ascii_only)
    assert (done.returncode, done.stderr) == (0, "\\xfc \\u4f60\n")


def test_a_deleted_working_directory_is_left(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    leave = f"mkdir {gone}; cd {gone}; rmdir {gone};"
    assert python("import os; os.getcwd()", leave).returncode == 1
    assert python(f"{BEGIN}import os; print(os.getcwd())", leave).stdout == "/\n"
    assert python(f"{BEGIN}import os; print(os.getcwd())", cwd=tmp_path).stdout == f"{tmp_path}\n"


@pytest.mark.parametrize("hard", [64, 256])
def test_the_limit_of_open_files_is_raised_to_the_hard_one(hard: int) -> None:
    done = python(f"{BEGIN}import resource; print(*resource.getrlimit(7))", f"ulimit -Sn 64; ulimit -Hn {hard};")
    assert done.stdout == f"{hard} {hard}\n"
