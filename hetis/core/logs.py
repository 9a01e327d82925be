"""Logging of all processes of a fleet: lines on stderr with time, level and the name of the process.

A Python program that uses `LLM` keeps its own logging configuration: its process logs to the logger "hetis", and the
processes that it starts inherit that logger's level. The command line, ranks and the driver install a handler.
"""

import logging
import os
import sys
import warnings
from functools import cache

LEVELS = ("debug", "info", "warning", "error")
VARIABLE = "HETIS_LOG_LEVEL"  # environment variable with the level of every process of a fleet
_LOGGERS = ("hetis", "hetis_kernels")
# Variables of libraries that warn at start about what users of hetis cannot change. Libraries read them on import.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def set_up_logging(process: str, default: str = "warning") -> None:
    """Installs the handler of a hetis process. Call it before torch or transformers is imported.

    `process`: "driver", "rank 3" or, for the command line, "". `default`: level if HETIS_LOG_LEVEL is not set. The last
    of several calls counts.
    """
    level = level_of_environment() or default
    handler = logging.StreamHandler()
    name_shown = f"hetis {process}".rstrip()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name_shown}: %(message)s", datefmt="%H:%M:%S"))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
    if level != "debug":
        for variable, value in _QUIET.items():
            os.environ.setdefault(variable, value)
        if not sys.warnoptions:  # else the user has chosen with -W
            warnings.simplefilter("ignore")


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
