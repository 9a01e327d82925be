"""Environment and fixtures of all tests.

Triton's kernels run under its interpreter if there is no GPU (set before triton is imported). Hypothesis draws the same
examples in every run, without a deadline, since other work slows the machine. Device profiles are cached for one run,
never in the user's cache. Without the C++ extensions no test starts, since hetis would run on slower replacements of
them; GPU tests (-m gpu) are excepted: they test other kernels, and may run while the extensions are built.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hetis import LLM

os.environ.setdefault("TRITON_INTERPRET", "1")
# a shell's background job ignores Ctrl-C, and its children inherit that: fleets under test must not
signal.signal(signal.SIGINT, signal.default_int_handler)
_cache = tempfile.TemporaryDirectory(prefix="hetis-tests-")  # removed when this process ends
os.environ["XDG_CACHE_HOME"] = _cache.name
if find_spec("hypothesis"):  # the tests that run on a GPU need none
    from hypothesis import HealthCheck, settings

    settings.register_profile("hetis", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("hetis")


def pytest_configure(config: pytest.Config) -> None:
    """Raises UsageError if a C++ extension cannot be used."""
    if config.getoption("markexpr") == "gpu":
        return
    from hetis.dispatcher import native
    from hetis_kernels import extension

    if (problem := extension.problem() or native.problem()) is not None:
        raise pytest.UsageError(problem)


def own_group(controller: str) -> Path:
    """The directory of this process's control group (version 1) of `controller`; skips the test if there is none."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    path = next((line.split(":", 2)[2] for line in lines if controller in line.split(":")[1].split(",")), None)
    if path is None:
        pytest.skip(f"no {controller} controller of version 1 here")
    return Path("/sys/fs/cgroup") / controller / path.lstrip("/")


@pytest.fixture
def groups() -> Iterator[dict[str, Path]]:
    """New control groups below that of this process, by controller; skips the test if they cannot be made."""
    made = {name: own_group(name) / f"hetis-test-{os.getpid()}" for name in ("memory", "cpu")}
    try:
        for path in made.values():
            path.mkdir()
        yield made
    except OSError as error:
        pytest.skip(f"cannot make a control group here: {error}")
    finally:
        for path in made.values():
            if path.is_dir():
                path.rmdir()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A new directory with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="t"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def tiny() -> Iterator["LLM"]:
    """The model in the package on one primary and two workers, all of which get lanes, independent of their speed."""
    from hetis import LLM

    options = {"device": "cpu", "dtype": "float32", "kv_cache_memory": "32MiB", "dispatch": "even"}
    with LLM(plan="1+2", max_logprobs=50, **options) as llm:
        yield llm
