"""Set before anything imports triton: without a GPU its kernels run under the interpreter.

What devices were measured to do is kept for the tests of one run, and never in the user's own cache. Without its C++
extensions hetis would pass on slower twins of what it ships, so no test starts then.
"""

import os
import tempfile

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
_cache = tempfile.TemporaryDirectory(prefix="hetis-tests-")  # removed when this process ends
os.environ["XDG_CACHE_HOME"] = _cache.name


def pytest_configure(config: pytest.Config) -> None:
    """Raises UsageError if a C++ extension cannot be used."""
    from hetis.dispatcher import native
    from hetis_kernels import extension

    if (problem := extension.problem() or native.find()[1]) is not None:
        raise pytest.UsageError(problem)
