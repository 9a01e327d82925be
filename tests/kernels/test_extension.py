"""Where the C++ extension cannot be used, one sentence says why and what to do."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hetis_kernels import extension


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the extension is looked for during the test."""
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    extension.problem.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    extension.problem.cache_clear()


def check(*words: str) -> None:
    problem = extension.problem()
    assert problem is not None
    assert not extension.load()
    assert "\n" not in problem
    assert all(word in problem for word in (*words, "slower", "--no-build-isolation")), problem


def test_it_is_there_and_was_built_for_this_torch() -> None:
    assert extension.problem() is None
    assert extension.load()
    assert torch.__version__.startswith(torch.ops.hetis.built_for_torch())


def test_sources_that_were_not_installed_have_none(folder: Path) -> None:
    check("is not built: hetis runs from sources that were not installed;")


def test_the_cause_is_what_the_installation_left(folder: Path) -> None:
    (folder / "_cpu.missing").write_text("torch was not installed")
    check("is not built: torch was not installed;")


def test_a_file_for_another_machine_cannot_be_loaded(folder: Path) -> None:
    (folder / "_cpu.so").write_bytes(b"built for another machine")
    check("cannot be loaded")


def test_one_for_another_torch_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "_cpu.so").symlink_to(next(Path(extension.__file__).parent.glob("_cpu*.so")))
    built_for = torch.ops.hetis.built_for_torch()
    monkeypatch.setattr(torch, "__version__", f"{built_for}1+cpu")
    check(f"was built for torch {built_for}, and this is torch {built_for}1+cpu")
