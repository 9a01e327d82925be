"""The fleet's table: what the cache, the policies and the ranks know of each member."""

from collections.abc import Mapping

import msgspec

from hetis.cache.cache_manager import CacheManager
from hetis.core.device_info import RankStats
from hetis.core.messages import DeviceModel, MemberStats, Setup
from hetis.engine.observer import Observer


def member_stats(
    setup: Setup, cache: CacheManager, stats: Mapping[int, RankStats], observer: Observer | None
) -> list[MemberStats]:
    """The lines of the fleet's table in rank order. `stats`: of all ranks."""
    queries = setup.spec.queries_per_group
    total = sum(counted.attention_seconds for counted in stats.values()) or 1.0
    members = []
    for member, usage in zip(setup.plan.members, cache.usage().values(), strict=True):
        rank = member.rank
        predicted_us, measured_us = observer.mean_us(rank) if observer else (0.0, 0.0)
        members.append(
            MemberStats(
                rank=rank,
                role=setup.plan.role_of(rank),
                device=member.device,
                heads=usage.num_lanes * queries,
                heads_peak=usage.lanes_peak * queries,
                pages_used=usage.pages_used,
                pages_total=usage.pages_total,
                pages_peak=usage.pages_peak,
                attention_seconds=stats[rank].attention_seconds,
                attention_share=stats[rank].attention_seconds / total,
                bytes_sent=stats[rank].bytes_sent,
                bytes_received=stats[rank].bytes_received,
                model=_model(observer, rank) if observer else None,
                predicted_us=predicted_us,
                measured_us=measured_us,
            )
        )
    return members


def _model(observer: Observer, rank: int) -> DeviceModel:
    cost = observer.cost
    return DeviceModel(
        **msgspec.structs.asdict(cost.rates(rank, is_worker=False)),
        factors=cost.factors(rank),
        link_constant_us=cost.link_us(rank, 1) - (cost.link_us(rank, 2) - cost.link_us(rank, 1)),
        link_us_per_head=cost.link_us(rank, 2) - cost.link_us(rank, 1),
    )
