"""What solves the placement problem (`problem.py`) in this process."""

import logging
from functools import cache
from math import inf
from typing import Protocol

from hetis.dispatcher import native
from hetis.dispatcher.insertion import InsertionSolver
from hetis.dispatcher.problem import Counts, Problem

_log = logging.getLogger(__name__)


class Solver(Protocol):
    """Solves problems with at least one device and one sequence. Equal problems have equal solutions on one machine."""

    def solve(self, problem: Problem) -> Counts | None:
        """A placement with a small makespan, the least for one sequence; None if none was found that fits."""
        ...

    def lower_bound_us(self, problem: Problem, reached_us: float, enough_us: float = inf) -> float:
        """A lower bound on the makespan, from the Lagrangian dual of the fractional relaxation.

        `reached_us`: the makespan of some placement. `enough_us`: a bound above it is returned as infinity, which takes
        less time than to compute it.
        """
        ...


@cache
def choose_solver() -> Solver:
    """The C++ solver, or plain insertion where it cannot be used; then the log says why, once in a process."""
    try:
        return native.load()
    except ImportError as error:
        _log.warning("%s", error)
        return InsertionSolver()
