"""The policies that `--dispatch` chooses: how lanes are placed, and whether they migrate."""

from collections.abc import Callable
from typing import NamedTuple

from hetis.core.config import EngineConfig
from hetis.core.messages import Setup
from hetis.core.model_spec import DTYPE_BYTES
from hetis.core.placement import Dispatcher
from hetis.core.profile import FleetProfile
from hetis.cost.cost_model import CostModel
from hetis.cost.footprint import layer_weights
from hetis.dispatcher.hetis_dispatcher import HetisDispatcher
from hetis.dispatcher.rebalance import Rebalancer
from hetis.dispatcher.simple_dispatchers import EvenDispatcher, PrimaryOnlyDispatcher, ProportionalDispatcher

SIMPLE: dict[str, Callable[[], Dispatcher]] = {  # values of `--dispatch` that need no profile
    "proportional": ProportionalDispatcher,
    "even": EvenDispatcher,
    "primary-only": PrimaryOnlyDispatcher,
}
TYPICAL_DECODES = 16  # sequences in a step, for the first estimate of its non-attention time


class Policies(NamedTuple):
    """`rebalancer` and `cost` only where lanes migrate, by speeds that are followed."""

    dispatcher: Dispatcher
    rebalancer: Rebalancer | None = None
    cost: CostModel | None = None


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
    return Policies(HetisDispatcher(cost), Rebalancer(cost, config.theta), cost)
