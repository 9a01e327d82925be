"""Running fleets, one for each module that wants it, since starting one takes seconds; and directories for others."""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hetis import LLM

# a shell's background job starts with Ctrl-C ignored, and what it starts inherits that: the fleets under test must not
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path, for sockets; nothing may be left in it."""
    path = Path(tempfile.mkdtemp(prefix="t"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    """The model in the package on one primary and two workers, all of which get lanes, whatever their speed today."""
    options = {"device": "cpu", "dtype": "float32", "kv_cache_memory": "32MiB", "dispatch": "even"}
    with LLM(plan="1+2", max_logprobs=50, **options) as llm:
        yield llm
