"""Logging of all processes of a fleet: lines on stderr with time, level and the name of the process, or JSON objects.

A Python program that uses `LLM` keeps its own logging configuration: its process logs to the logger "hetis", and the
processes that it starts inherit that logger's level. The command line, ranks and the driver install a handler.
"""

import json
import logging
import os
import sys
import traceback
import warnings
from functools import cache
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
VARIABLE = "HETIS_LOG_LEVEL"  # environment variable with the level of every process of a fleet
FORMATS = ("text", "json")
FORMAT_VARIABLE = "HETIS_LOG_FORMAT"  # set for fleets that serve: their lines have a date, or are JSON objects
_LOGGERS = ("hetis", "hetis_kernels")
_LIBRARIES = ("uvicorn", "asyncio")  # whose lines a server has as well, from warnings upwards
# Variables of libraries that warn at start about what users of hetis cannot change. Libraries read them on import.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def set_up_logging(process: str, default: str = "warning", *, serves: bool = False) -> None:
    """Installs the handler of a hetis process. Call it before torch or transformers is imported.

    `process`: "driver", "rank 3" or, for the command line, "". `default`: level if HETIS_LOG_LEVEL is not set.
    `serves`: the process handles texts of clients, which no line may show. The last of several calls counts.
    """
    level = level_of_environment() or default
    handler = logging.StreamHandler()
    handler.setFormatter(_formatter(f"hetis {process}".rstrip(), serves))
    for name in (*_LOGGERS, *(_LIBRARIES if serves else ())):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
        if name in _LIBRARIES and level == "info":
            logger.setLevel(logging.WARNING)
        logger.propagate = False
    if level != "debug":
        for variable, value in _QUIET.items():
            os.environ.setdefault(variable, value)
        if not sys.warnoptions:  # else the user has chosen with -W
            warnings.simplefilter("ignore")


class _TextFormatter(logging.Formatter):
    """Lines of text. `is_private`: exceptions are shown as type and stack, as their messages may quote a request."""

    def __init__(self, process: str, is_private: bool, datefmt: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}: %(message)s", datefmt)
        self._process, self._is_private = process, is_private

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's name)
        if not self._is_private:
            return super().formatException(ei)
        kind, _, stack = ei
        return f"{''.join(traceback.format_tb(stack))}{kind.__name__}"


class _JsonFormatter(_TextFormatter):
    """One JSON object per line: time (with the zone), level, process, message, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, self.datefmt),
            "level": record.levelname.lower(),
            "process": self._process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _formatter(process: str, is_private: bool) -> logging.Formatter:
    chosen = os.environ.get(FORMAT_VARIABLE)
    if chosen == "json":
        return _JsonFormatter(process, is_private, "%Y-%m-%dT%H:%M:%S%z")
    return _TextFormatter(process, is_private, "%Y-%m-%d %H:%M:%S" if chosen else "%H:%M:%S")


def level_of_environment() -> str | None:
    """The level in HETIS_LOG_LEVEL; None if it is not set. An unknown level is ignored with a warning."""
    level = os.environ.get(VARIABLE, "").strip().lower()
    if level in LEVELS:
        return level
    if level:
        _warn_of_unknown(level)
    return None


@cache
def _warn_of_unknown(level: str) -> None:
    """Logs a warning once per level, however often the variable is read."""
    logging.getLogger("hetis").warning("%s is %r, which is ignored; use one of %s.", VARIABLE, level, ", ".join(LEVELS))


def environment_of_children() -> dict[str, str]:
    """Environment variables that give the processes of a fleet the log level of this process."""
    return {VARIABLE: level_of_environment() or _nearest_level(logging.getLogger("hetis").getEffectiveLevel())}


def _nearest_level(number: int) -> str:
    """The lowest of `LEVELS` that a logger of level `number` (Python's logging) emits."""
    return next((name for name in LEVELS if getattr(logging, name.upper()) >= number), LEVELS[-1])
