"""The installed package is imported from any working directory, also beside a folder of the same name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# without PYTHONPATH and other variables of Python, which could hide an incomplete installation
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(where: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=where, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.fixture(params=["checkout", "empty folder", "nothing"])
def beside(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A working directory with other folders called `hetis` and `hetis_kernels`, or without."""
    if request.param == "checkout":
        (tmp_path / "hetis").symlink_to(ROOT)
    elif request.param == "empty folder":
        (tmp_path / "hetis").mkdir()
        (tmp_path / "hetis_kernels").mkdir()
    return tmp_path


def test_both_packages_are_those_of_the_checkout(beside: Path) -> None:
    show = "import hetis, hetis_kernels; from hetis import LLM; print(hetis.__file__); print(hetis_kernels.__file__)"
    found = [Path(line).resolve() for line in run(beside, "-c", show).splitlines()]
    assert found == [ROOT / "hetis/__init__.py", ROOT / "kernels/__init__.py"]


def test_the_module_runs(beside: Path) -> None:
    assert "usage: hetis" in run(beside, "-m", "hetis", "--help")


def test_only_the_packages_are_on_the_path() -> None:
    """Other projects may have modules called `tests`, `bench` and `kernels`."""
    assert sorted(path.name for path in (ROOT / "build" / "packages").iterdir() if path.is_symlink()) == [
        "hetis",
        "hetis_kernels",
    ]
    paths = run(Path("/"), "-c", "import sys; print(*sys.path, sep='\\n')").splitlines()
    assert str(ROOT) not in paths
    assert str(ROOT / "build" / "packages") in paths


# --- without a compiler, or without torch -----------------------------------------------------------------------------

EXTENSIONS = {"hetis_kernels/_cpu", "hetis/dispatcher/_solver"}


def build(where: Path, **variables: str) -> tuple[int, str, dict[str, str]]:
    """Builds the extensions into a folder; (exit code, last line of stderr, cause of each missing extension)."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", f"--build-lib={where}", f"--build-temp={where}/temp"]
    environment = ENVIRONMENT | {"CC": "false", "CXX": "false"} | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    causes = {str(path.relative_to(where).with_suffix("")): path.read_text() for path in where.rglob("*.missing")}
    return done.returncode, done.stderr.strip().splitlines()[-1], causes


def test_the_cause_of_a_failed_build_is_stored(tmp_path: Path) -> None:
    stale = tmp_path / "hetis_kernels" / "_cpu.so"
    stale.parent.mkdir()
    stale.write_text("of an earlier build")
    code, _, causes = build(tmp_path)
    assert code == 0
    assert causes == dict.fromkeys(EXTENSIONS, "the C++ compiler failed")
    assert not stale.exists()


def test_without_torch_the_cause_is_torch(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError")
    code, _, causes = build(tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert code == 0
    assert causes["hetis_kernels/_cpu"] == "torch was not installed in this environment when hetis was"


def test_required_extensions_that_cannot_be_built_end_the_installation(tmp_path: Path) -> None:
    code, last, causes = build(tmp_path, HETIS_REQUIRE_EXTENSIONS="1")
    assert code != 0
    assert last.startswith("hetis: the C++ extension ")
    assert last.endswith(" cannot be built: the C++ compiler failed.")
    assert causes == {}
