"""How the C++ solver is found, and what decides where it cannot be used."""

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hetis.dispatcher import native
from hetis.dispatcher.insertion import InsertionSolver
from hetis.dispatcher.native import NativeSolver
from hetis.dispatcher.solver import choose_solver


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder in which the library is looked for, in a process that has not chosen a solver yet."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    choose_solver.cache_clear()
    yield tmp_path
    choose_solver.cache_clear()


def test_the_solver_of_this_process_is_the_native_one() -> None:
    assert isinstance(choose_solver(), NativeSolver)


def test_without_the_library_insertion_decides_and_the_log_says_so_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_solver(), InsertionSolver)
        assert choose_solver() is choose_solver()
    assert len(caplog.records) == 1
    assert "not built: hetis runs from sources that were not installed; lanes are placed by plain" in caplog.text
    assert "--no-deps ." in caplog.text


def test_the_cause_that_the_installation_left_is_named(folder: Path) -> None:
    (folder / "_solver.missing").write_text("there was no C++ compiler (install g++)")
    with pytest.raises(ImportError, match=r"not built: there was no C\+\+ compiler \(install g\+\+\);"):
        native.load()


def test_a_library_for_another_machine_counts_as_missing(folder: Path) -> None:
    (folder / "_solver.so").write_bytes(b"for another machine")
    with pytest.raises(ImportError, match="cannot be loaded"):
        native.load()


def test_a_library_without_the_functions_counts_as_missing(folder: Path) -> None:
    """As one from an earlier build, whose functions have other arguments and so other names."""
    (folder / "_solver.so").symlink_to(msgspec._core.__file__)
    with pytest.raises(ImportError, match="undefined symbol: hetis_solve"):
        native.load()
