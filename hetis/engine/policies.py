"""What `--dispatch` chooses: how lanes are placed, and whether they move."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from hetis.core.config import EngineConfig
from hetis.core.messages import Setup
from hetis.core.model_spec import DTYPE_BYTES
from hetis.core.placement import Dispatcher
from hetis.core.profile import FleetProfile
from hetis.cost.cost_model import CostModel
from hetis.cost.footprint import layer_weights
from hetis.dispatcher.balance import balance
from hetis.dispatcher.milp import balance_by_highs
from hetis.dispatcher.proportional import ProportionalDispatcher
from hetis.dispatcher.rebalance import Rebalancer
from hetis.dispatcher.rules import EvenDispatcher, HetisDispatcher, PrimaryOnlyDispatcher

SIMPLE: dict[str, Callable[[], Dispatcher]] = {
    "proportional": ProportionalDispatcher,
    "even": EvenDispatcher,
    "primary-only": PrimaryOnlyDispatcher,
}
SOLVERS = {"hetis": balance, "highs": balance_by_highs}
TYPICAL_DECODES = 16  # sequences in a step, for the first guess of its dense part


class Policies(NamedTuple):
    """`rebalancer`, `cost`: only where lanes move, and speeds are followed."""

    dispatcher: Dispatcher
    rebalancer: Rebalancer | None = None
    cost: CostModel | None = None


def check_solver(dispatch: str) -> None:
    """Raises ValueError if what solves the problems of this policy is not installed: on the driver's host, at start."""
    if dispatch == "highs" and find_spec("scipy") is None:
        raise ValueError("--dispatch highs solves with HiGHS, which comes with scipy: pip install scipy.")


def make_policies(config: EngineConfig, setup: Setup, profile: FleetProfile | None) -> Policies:
    """`profile`: of the fleet; None where nothing was measured: without workers there is nothing to decide."""
    if profile is None or config.dispatch in SIMPLE:
        return Policies(SIMPLE.get(config.dispatch, PrimaryOnlyDispatcher)())
    cost = CostModel(profile, setup.spec, setup.dtype)
    for primary in setup.plan.primaries:
        layer = profile.devices[primary.rank].layer
        assert layer is not None, f"rank {primary.rank} is a primary without a profile of its layers"
        weights = layer_weights(setup.spec, setup.plan, primary)
        dense_us = layer.dense.time_us(weights * DTYPE_BYTES[setup.dtype], 2.0 * weights * TYPICAL_DECODES)
        cost.observe_dense(primary.rank, dense_us)
    dispatcher = HetisDispatcher(cost, solve=SOLVERS[config.dispatch])
    return Policies(dispatcher, Rebalancer(cost, config.theta), cost)
