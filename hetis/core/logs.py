"""Logging of all processes of a fleet: lines on stderr with time, level and the name of the process.

A Python program that uses `LLM` keeps its own logging: its process only logs to the logger "hetis", and the processes
that it starts take over that logger's level. The command line, ranks and the driver set up their own handler.
"""

import logging
import os
import sys
import warnings
from functools import cache

LEVELS = ("debug", "info", "warning", "error")
VARIABLE = "HETIS_LOG_LEVEL"  # environment variable: the level of every process of a fleet
_LOGGERS = ("hetis", "hetis_kernels")
# Libraries that warn at start about what users of hetis cannot change; read when they are imported.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def set_up_logging(process: str, default: str = "warning") -> None:
    """For a process of our own, before it imports torch or transformers. `process`: "driver", "rank 3"; "": the command
    line. The level is HETIS_LOG_LEVEL's, or `default`. May be called again: the last call counts.
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
        if not sys.warnoptions:  # else the user has said what to show
            warnings.simplefilter("ignore")


def level_of_environment() -> str | None:
    """What HETIS_LOG_LEVEL says; None if it is not set. A value that is no level is warned of and not used."""
    level = os.environ.get(VARIABLE, "").strip().lower()
    if level in LEVELS:
        return level
    if level:
        _warn_of(level)
    return None


@cache
def _warn_of(level: str) -> None:
    """Once, however often the variable is looked at."""
    logging.getLogger("hetis").warning(
        "%s is %r and not used: it must be one of %s.", VARIABLE, level, ", ".join(LEVELS)
    )


def environment_of_children() -> dict[str, str]:
    """Gives the processes of a fleet the level that this process has."""
    return {VARIABLE: level_of_environment() or _nearest_level(logging.getLogger("hetis").getEffectiveLevel())}


def _nearest_level(number: int) -> str:
    """The lowest level that `number`, a level of Python's logging, lets through."""
    return next((name for name in LEVELS if getattr(logging, name.upper()) >= number), LEVELS[-1])
