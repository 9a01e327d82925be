"""Host time of one rebalancing decision, which the driver takes four times a second between two steps.

    python bench/bench_rebalance.py [--sequences 64] [--groups 8] [--workers 7] [--repeats 50]

Settled: lanes are balanced, so nothing moves; the usual case. Begun: all lanes are on the primary, and 16 sequences
move in one call. The fastest of all repeats counts.
"""

import argparse
import time
from random import Random

from hetis.core.model_spec import ModelSpec
from hetis.core.placement import FleetView, PoolId
from hetis.core.plan import Plan
from hetis.core.plan_sources import resolve_plan
from hetis.core.profile import AttentionProfile, DeviceProfile, FleetProfile, LinkProfile, ProfileKey, TransferProfile
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.rebalance import MigrationBudget, Rebalancer
from hetis.dispatcher.residents import Resident

KEY = ProfileKey(
    device="synthetic", driver="", dtype="bfloat16", head_dim=128, queries_per_group=2, page_size=32, backend="none",
    enforce_eager=False, version="",
)  # fmt: skip
PRIMARY_SPEED = 4.0  # as a multiple of a worker's


def synthetic_cost(spec: ModelSpec, plan: Plan) -> CostModel:
    """A fleet of equal workers and a faster primary."""
    way = TransferProfile(alpha_us=5.0, beta_us_per_byte=1e-4)
    devices = {}
    for rank in plan.ranks:
        speed = PRIMARY_SPEED if rank == 0 else 1.0
        line = AttentionProfile(us_per_head=0.1 / speed, us_per_byte=1e-5 / speed, constant_us=10.0)
        devices[rank] = DeviceProfile(key=KEY, attention=line, read_bytes_per_us=1e5, usable_bytes=0)
    links = [LinkProfile(primary=0, worker=worker, request=way, reply=way) for worker in plan.worker_ranks]
    cost = CostModel(FleetProfile(devices=devices, links=tuple(links)), spec, "bfloat16")
    cost.observe_dense(0, 500.0)
    return cost


def fastest_us(cost: CostModel, view: FleetView, residents: list[Resident], repeats: int) -> tuple[float, int]:
    """Host time in microseconds, and the number of lanes that move."""
    times, num_moves = [], 0
    for _ in range(repeats):
        rebalancer, budget = Rebalancer(cost), MigrationBudget(1e12, 1e12)
        begin = time.perf_counter()
        num_moves = len(rebalancer.compute(residents, view, budget).moves)
        times.append((time.perf_counter() - begin) * 1e6)
    return min(times), num_moves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sequences", 64), ("groups", 8), ("workers", 7), ("repeats", 50)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    arguments = parser.parse_args()
    spec = ModelSpec(
        family="qwen3",
        num_layers=28,
        hidden_size=1024,
        num_query_heads=2 * arguments.groups,
        num_head_groups=arguments.groups,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151936,
        max_position=40960,
        dtype="bfloat16",
    )
    plan, rng = resolve_plan(f"1+{arguments.workers}", spec), Random(0)
    cost = synthetic_cost(spec, plan)
    pools = [PoolId(rank, 0) for rank in plan.ranks]
    nothing = dict.fromkeys(pools, 0)
    view = FleetView(
        plan=plan,
        page_size=32,
        free_pages=dict.fromkeys(pools, 1 << 20),
        held_lanes=nothing,
        held_tokens=nothing,
    )
    shares = [0] * int(PRIMARY_SPEED) + list(plan.worker_ranks)
    for name, ranks in (("settled", shares), ("begun", [0])):
        residents = [
            Resident(
                slot=slot,
                arrival=slot,
                num_tokens=rng.randint(100, 4000),
                owners=(tuple(rng.choice(ranks) for _ in range(arguments.groups)),),
            )
            for slot in range(arguments.sequences)
        ]
        us, num_moves = fastest_us(cost, view, residents, arguments.repeats)
        print(f"{name:8} {us:7.0f} us, {num_moves} lanes move")


if __name__ == "__main__":
    main()
