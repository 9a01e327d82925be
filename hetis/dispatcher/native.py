"""Finds, loads and calls the C++ solver (csrc/dispatcher), which returns the very counts of its Python reference."""

import logging
from ctypes import CDLL, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from itertools import chain
from math import isnan
from pathlib import Path
from struct import pack

from hetis.dispatcher.problem import Counts, Problem

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
INSTALL = "pip install setuptools ninja && pip install --no-build-isolation --force-reinstall --no-deps ."
INTERFACE = 1  # of csrc/dispatcher/library.cpp: a library with another one would be read out of bounds


class Library:
    """The functions of csrc/dispatcher/library.cpp, for problems with at least one device and one sequence.

    They raise MemoryError where there is none left.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be loaded or has another interface; AttributeError without functions."""
        library = CDLL(str(path))
        library.hetis_interface.restype = c_int64
        found = library.hetis_interface()
        if found != INTERFACE:
            raise OSError(f"it has interface {found}, not {INTERFACE}")
        self._balance = library.hetis_balance
        self._balance.argtypes, self._balance.restype = (c_char_p, c_char_p, c_void_p), c_int
        self._is_possible = library.hetis_is_possible
        self._is_possible.argtypes, self._is_possible.restype = (c_char_p, c_char_p, c_double), c_int
        self._least_possible_us = library.hetis_least_possible_us
        self._least_possible_us.argtypes, self._least_possible_us.restype = (c_char_p, c_char_p, c_double), c_double

    def balance(self, problem: Problem) -> Counts | None:
        """See `balance.balance`."""
        num_sequences, size = problem.num_sequences, problem.num_devices * problem.num_sequences
        counts = (c_int64 * size)()
        found = self._balance(*_flat(problem), counts)
        if found < 0:
            raise MemoryError(f"no memory to place {num_sequences} sequences on {problem.num_devices} devices")
        if not found:
            return None
        flat = counts[:]
        return [flat[begin : begin + num_sequences] for begin in range(0, size, num_sequences)]

    def is_possible(self, problem: Problem, limit_us: float) -> bool:
        """See `bound.is_possible`."""
        possible = self._is_possible(*_flat(problem), limit_us)
        if possible < 0:
            raise MemoryError(f"no memory to bound the peak of {problem.num_sequences} sequences")
        return bool(possible)

    def least_possible_us(self, problem: Problem, highest_us: float) -> float:
        """See `bound.least_possible_us`."""
        lowest_us: float = self._least_possible_us(*_flat(problem), highest_us)
        if isnan(lowest_us):
            raise MemoryError(f"no memory to bound the peak of {problem.num_sequences} sequences")
        return lowest_us


def _flat(problem: Problem) -> tuple[bytes, bytes]:
    """Sizes and arrays as library.cpp reads them.

    `pack` is the fastest way to convert lists: 50 us for 4096 floats, where array.array takes 140 and numpy 250.
    """
    num_devices, num_sequences = problem.num_devices, problem.num_sequences
    num_floats, num_integers = num_devices * (2 + num_sequences), 2 * (num_devices + num_sequences)
    arrays = pack(
        f"{num_floats}d{num_integers}q",
        *problem.start_us,
        *problem.floor_us,
        *chain.from_iterable(problem.lane_us),
        *problem.most_lanes,
        *problem.free_pages,
        *problem.home_pages,
        *problem.worker_pages,
    )
    return pack("4q", num_devices, num_sequences, problem.num_lanes, problem.num_homes), arrays


@cache
def find() -> tuple[Library | None, str | None]:
    """The library, loaded once for this process, or a sentence that says why there is none; it is logged once."""
    libraries = sorted(FOLDER.glob("_solver*.so"))
    try:
        if libraries:
            return Library(libraries[0]), None
        what = f"is not built: {_cause()}"
    except (OSError, AttributeError) as error:
        what = f"cannot be loaded ({error})"
    problem = (
        f"the dispatcher's C++ solver {what}; placing many sequences at once takes up to tens of milliseconds. "
        f"Remedy, in the checkout of hetis: {INSTALL}"
    )
    logger.warning("%s", problem)
    return None, problem


def load() -> Library | None:
    """The library; None where it cannot be used, and then its references in Python decide."""
    return find()[0]


def _cause() -> str:
    """What setup.py left in place of the library."""
    try:
        return (FOLDER / "_solver.missing").read_text()
    except FileNotFoundError:
        return "hetis runs from sources that were not installed"
