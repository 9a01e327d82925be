"""Every process logs with time, level and its name; processes inherit the level from the front end that starts them."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hetis.core.logs import FORMAT_VARIABLE, LEVELS, VARIABLE, environment_of_children, level_of_environment

SCRIPT = """
import logging, warnings
from hetis.core.logs import set_up_logging
set_up_logging("first")
set_up_logging("driver")
for level in ("debug", "info", "warning", "error"):
    getattr(logging.getLogger("hetis.engine"), level)("of %s", level)
logging.getLogger("hetis_kernels.extension").error("of kernels")
warnings.warn("for developers")
"""


def lines(level: str | None) -> list[str]:
    """Lines that a process with HETIS_LOG_LEVEL=`level` writes to stderr."""
    environment = {} if level is None else {VARIABLE: level}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == ""
    return result.stderr.splitlines()


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("hetis")
    before = logger.level
    yield logger
    logger.setLevel(before)


@pytest.mark.parametrize(("level", "count"), [(None, 2), ("info", 3), ("warning", 2), ("error", 1), ("Error", 1)])
def test_lines_have_time_level_and_process_once(level: str | None, count: int) -> None:
    found = lines(level)
    assert len(found) == count + 1, found
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d [A-Z]+ hetis driver: of \w+", line) for line in found)
    words = [line.split()[1] for line in found]
    assert words == [*[name.upper() for name in LEVELS[-count:]], "ERROR"]


def test_warnings_for_developers_are_shown_when_debugging_only() -> None:
    assert not any("for developers" in line for line in lines("info"))
    assert any("for developers" in line for line in lines("debug"))


def test_children_inherit_the_level_of_the_logger(logger: logging.Logger) -> None:
    for number, name in ((5, "debug"), (10, "debug"), (20, "info"), (25, "warning"), (30, "warning"), (50, "error")):
        logger.setLevel(number)
        assert environment_of_children() == {VARIABLE: name}


def test_the_variable_overrides_the_logger(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    logger.setLevel(logging.ERROR)
    monkeypatch.setenv(VARIABLE, " INFO ")
    assert environment_of_children() == {VARIABLE: "info"}


def test_an_unknown_level_is_ignored_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, "loud")
    assert level_of_environment() is level_of_environment() is None
    assert [record.getMessage() for record in caplog.records] == [
        "HETIS_LOG_LEVEL is 'loud', which is ignored; use one of debug, info, warning, error."
    ]


SERVING = """
import logging
from hetis.core.logs import set_up_logging
set_up_logging("", "info", serves=True)
try:
    raise ValueError("the text of a prompt")
except ValueError:
    logging.getLogger("hetis").error("a request failed", exc_info=True)
    logging.getLogger("asyncio").error("a task failed", exc_info=True)
logging.getLogger("uvicorn.error").info("of uvicorn")
logging.getLogger("uvicorn.error").warning("of uvicorn")
logging.getLogger("hetis.access").info("a line", extra={"fields": {"status": 200}})
"""


def serving(chosen: str) -> list[str]:
    """Lines of a process that serves."""
    result = subprocess.run(
        [sys.executable, "-c", SERVING], env={FORMAT_VARIABLE: chosen}, capture_output=True, text=True, check=True
    )
    assert result.stdout == ""
    assert "the text of a prompt" not in result.stderr
    return result.stderr.splitlines()


def test_lines_of_a_server_have_the_date_and_those_of_libraries_look_alike() -> None:
    found = serving("text")
    first = [line for line in found if re.match(r"\d\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d [A-Z]+ hetis: ", line)]
    assert [line.split(": ")[1] for line in first] == ["a request failed", "a task failed", "of uvicorn", "a line"]
    assert found.count("ValueError") == 2, "types without messages, which may quote a request"


def test_a_server_can_log_json() -> None:
    found = [json.loads(line) for line in serving("json")]
    assert [line["message"] for line in found] == ["a request failed", "a task failed", "of uvicorn", "a line"]
    assert [line["level"] for line in found] == ["error", "error", "warning", "info"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", line["time"]) for line in found)
    assert found[0]["process"] == "hetis"
    assert found[0]["exception"].endswith("ValueError")
    assert found[3]["status"] == 200
