"""Scripts of bench/ start and say what they lack; targets and files that texts name exist."""

import re
import subprocess
import sys
from pathlib import Path

import extras
import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "bench").glob("*.py") if "ArgumentParser" in path.read_text())
TEXTS = [
    str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench/LOG.md"])
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: " in done.stdout


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench_some.py"])
    extras.need("json", "re")
    with pytest.raises(SystemExit) as ended:
        extras.need("json", "no_such_module", "nor_this")
    assert ended.value.code == "bench_some.py needs no_such_module, nor_this: run `make install-bench` first."


@pytest.mark.parametrize("text", TEXTS)
def test_targets_and_files_that_are_named_exist(text: str) -> None:
    words = (ROOT / text).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", words, re.MULTILINE))
    assert named <= targets
    folders = "bench|tests|docs|hetis|kernels|csrc"
    paths = {path for path in re.findall(rf"\b(?:{folders})/[\w/]+\.\w+", words) if not path.endswith(".jsonl")}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_readme_names_targets_at_all() -> None:
    assert len(re.findall(r"(?:`|^)make [a-z-]+", (ROOT / "README.md").read_text(), re.MULTILINE)) >= 4
