"""Small fleets with known speeds, and views of them, for dispatchers and rebalancing."""

from collections import abc

from hetis.core.model_spec import ModelSpec
from hetis.core.placement import FleetView, Placement, PoolId, pools_of
from hetis.core.plan import Plan
from hetis.core.profile import (
    AttentionProfile,
    DeviceProfile,
    FleetProfile,
    LinkProfile,
    ProfileKey,
    TransferProfile,
)
from hetis.core.request import Sequence
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.room import pages_of

PAGE_SIZE = 4
KEY = ProfileKey(
    device="test", driver="1", dtype="float32", head_dim=64, queries_per_group=2, page_size=PAGE_SIZE, backend="none",
    enforce_eager=False, version="1",
)  # fmt: skip


def make_spec(num_groups: int, num_layers: int = 1, windows: tuple[int, ...] = ()) -> ModelSpec:
    """M = 2, D = 64: 512 bytes of KV per token and lane in float32."""
    return ModelSpec(
        family="llama",
        num_layers=num_layers,
        hidden_size=64,
        num_query_heads=2 * num_groups,
        num_head_groups=num_groups,
        head_dim=64,
        intermediate_size=64,
        vocab_size=97,
        max_position=4096,
        dtype="float32",
        windows=windows,
    )


def device(speed: float = 1.0, constant_us: float = 0.0, floor_us: float = 0.0) -> DeviceProfile:
    """At speed 1 a head takes 0.5 us, so a lane of 2 heads 1 us, and 512 bytes (a token) 0.01 us."""
    attention = AttentionProfile(
        us_per_head=0.5 / speed, us_per_byte=0.01 / 512 / speed, constant_us=constant_us, floor_us=floor_us
    )
    return DeviceProfile(key=KEY, attention=attention, read_bytes_per_us=1.0, usable_bytes=0)


def link(primary: int, worker: int, alpha_us: float, beta_us_per_byte: float = 0.0) -> LinkProfile:
    """`alpha_us`: of a round trip."""
    way = TransferProfile(alpha_us=alpha_us / 2, beta_us_per_byte=beta_us_per_byte)
    return LinkProfile(primary=primary, worker=worker, request=way, reply=way)


def make_cost(
    plan: Plan, devices: abc.Sequence[DeviceProfile], alpha_us: float = 0.0, dense_us: float = 0.0, **shape: int
) -> CostModel:
    """`devices`: by rank. All links have the same latency, all primaries the same non-attention time."""
    links = [link(home.rank, worker.rank, alpha_us) for home, worker in plan.links]
    profile = FleetProfile(devices=dict(enumerate(devices)), links=tuple(links))
    cost = CostModel(profile, make_spec(plan.num_groups, **shape), "float32")
    for primary in plan.primaries:
        cost.observe_dense(primary.rank, dense_us)
    return cost


def make_view(
    plan: Plan,
    free_pages: abc.Sequence[int],
    held_lanes: dict[PoolId, int] | None = None,
    held_tokens: dict[PoolId, int] | None = None,
) -> FleetView:
    """`free_pages`: in the order of `pools_of`."""
    pools = pools_of(plan)
    nothing = dict.fromkeys(pools, 0)
    return FleetView(
        plan=plan,
        page_size=PAGE_SIZE,
        free_pages=dict(zip(pools, free_pages, strict=True)),
        held_lanes=nothing | (held_lanes or {}),
        held_tokens=nothing | (held_tokens or {}),
    )


def check_fits(view: FleetView, placements: abc.Sequence[Placement | None], sequences: abc.Sequence[Sequence]) -> None:
    """Counts pages lane by lane, of all placements together."""
    free = dict(view.free_pages)
    for placement, sequence in zip(placements, sequences, strict=True):
        if placement is None:
            continue
        now, later = pages_of(sequence, view.page_size)
        for stage, owners in enumerate(placement.owners):
            for group, owner in enumerate(owners):
                pool, home = PoolId(owner, stage), PoolId(view.plan.home_ranks[stage][group], stage)
                assert pool == home or view.plan.is_worker(owner)
                free[pool] -= later
                free[home] -= now if pool != home else 0
    touched = any(placement is not None for placement in placements)
    assert not touched or all(count >= min(0, view.free_pages[pool]) for pool, count in free.items())
