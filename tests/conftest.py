"""Set before anything imports triton: without a GPU its kernels run under the interpreter.

Examples of hypothesis are the same in every run, and may take as long as other work on the machine makes them.
What devices were measured to do is kept for the tests of one run, and never in the user's own cache. Without its C++
extensions hetis would pass on slower twins of what it ships, so no test starts then; but for those of a GPU (-m gpu),
which are about other kernels and may run while the extensions are built.
"""

import os
import tempfile
from importlib.util import find_spec

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
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

    if (problem := extension.problem() or native.find()[1]) is not None:
        raise pytest.UsageError(problem)
