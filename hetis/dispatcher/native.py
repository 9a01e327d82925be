"""Finds, loads and calls the C++ solver (csrc/dispatcher)."""

from ctypes import CDLL, c_char_p, c_double, c_int, c_int64, c_void_p
from itertools import chain
from math import inf, isnan
from pathlib import Path
from struct import pack

from hetis.dispatcher.problem import Counts, Problem

FOLDER = Path(__file__).parent
INSTALL = "pip install setuptools ninja && pip install --no-build-isolation --force-reinstall --no-deps ."


class NativeSolver:
    """A `Solver`. Methods raise MemoryError where the system has no memory left.

    One sequence is solved exactly. Several are inserted one by one or fitted under a limit, then lanes are exchanged
    between devices, until a lower bound proves that the makespan is within 2 % of the optimum (docs/dispatch.md).
    """

    def __init__(self, path: Path) -> None:
        """OSError if the file is no library for this machine; AttributeError if it lacks a function."""
        library = CDLL(str(path))
        self._solve = library.hetis_solve
        self._solve.argtypes, self._solve.restype = (c_char_p, c_char_p, c_void_p), c_int
        self._lower_bound_us = library.hetis_lower_bound_us
        self._lower_bound_us.argtypes = (c_char_p, c_char_p, c_double, c_double)
        self._lower_bound_us.restype = c_double

    def solve(self, problem: Problem) -> Counts | None:
        """See `Solver`. Lanes are at home wherever that does not raise the makespan."""
        num_sequences, size = problem.num_sequences, problem.num_devices * problem.num_sequences
        counts = (c_int64 * size)()
        found = self._solve(*_flat(problem), counts)
        if found < 0:
            raise MemoryError(f"no memory to place {num_sequences} sequences on {problem.num_devices} devices")
        if not found:
            return None
        flat = counts[:]
        return [flat[begin : begin + num_sequences] for begin in range(0, size, num_sequences)]

    def lower_bound_us(self, problem: Problem, reached_us: float, enough_us: float = inf) -> float:
        """See `Solver`. To a thousandth of `reached_us`."""
        bound_us: float = self._lower_bound_us(*_flat(problem), reached_us, enough_us)
        if isnan(bound_us):
            raise MemoryError(f"no memory to bound the makespan of {problem.num_sequences} sequences")
        return bound_us


def _flat(problem: Problem) -> tuple[bytes, bytes]:
    """Sizes and arrays as library.cpp reads them.

    `pack` is the fastest way to convert lists: 50 us for 4096 floats, where array.array takes 140 and numpy 250.
    """
    num_devices, num_sequences = problem.num_devices, problem.num_sequences
    assert num_devices * num_sequences > 0, "the library reads at least one device and one sequence"
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


def problem() -> str | None:
    """Why the solver cannot be used; None if it can."""
    try:
        load()
    except ImportError as error:
        return str(error)
    return None


def load() -> NativeSolver:
    """The solver, from the library beside this file. ImportError, with cause and remedy, where it cannot be used."""
    libraries = sorted(FOLDER.glob("_solver*.so"))
    try:
        if libraries:
            return NativeSolver(libraries[0])
        what = f"is not built: {_cause()}"
    except (OSError, AttributeError) as error:
        what = f"cannot be loaded ({error})"
    raise ImportError(
        f"the dispatcher's C++ solver {what}; lanes are placed by plain insertion, with less even load on the devices. "
        f"Remedy, in the checkout of hetis: {INSTALL}"
    )


def _cause() -> str:
    """Why there is no library, as setup.py has left it in its place."""
    try:
        return (FOLDER / "_solver.missing").read_text()
    except FileNotFoundError:
        return "hetis runs from sources that were not installed"
