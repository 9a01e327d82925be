"""The solvers of the placement problem."""

import pytest

from hetis.dispatcher import native
from hetis.dispatcher.insertion import InsertionSolver
from hetis.dispatcher.native import NativeSolver
from hetis.dispatcher.solver import Solver


@pytest.fixture(scope="session")
def native_solver() -> NativeSolver:
    return native.load()


@pytest.fixture(scope="session", params=[native.load, InsertionSolver], ids=["native", "insertion"])
def solver(request: pytest.FixtureRequest) -> Solver:
    """Each of them: what holds for both does not depend on how good a solver is."""
    found: Solver = request.param()
    return found
