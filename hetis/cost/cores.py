"""How the ranks of one host share its cores: what the ledger names and what a start warns of. Pure functions of data.

Ranks on CPUs compete where their affinity masks overlap. A worker beside a primary then brings no cores: it takes the
primary's. (Two cores of Zen 4, Qwen3-0.6B's shape, 16 requests: plan 1+1 gives 0.64 times the tokens of 1+0.)
"""

from collections.abc import Iterable, Sequence

from hetis.core.device_info import DeviceInfo
from hetis.core.plan import Plan
from hetis.core.sizes import plural, ranges


def cores_of(info: DeviceInfo) -> str:
    """Numbers of the cores in a rank's affinity mask, as "0-3,8", and a lower limit of its control groups."""
    limit = f" (at most {info.usable_cores:g})" if info.usable_cores < len(info.cores) else ""
    return ranges(info.cores) + limit


def threads_of(info: DeviceInfo) -> str:
    """The threads of a rank on a CPU and the cores they may use, as "2 threads on cores 0-3"."""
    threads = plural(info.num_threads, "thread")
    return f"{threads} on core{'' if len(info.cores) == 1 else 's'} {cores_of(info)}" if info.cores else threads


def crowded_cores(plan: Plan, fleet: Sequence[DeviceInfo]) -> list[str]:
    """One sentence for each set of ranks on CPUs of one host whose cores overlap: who loses what, and the remedy."""
    return [_sentence(plan, group) for group in _groups(fleet) if len(group) > 1]


def _groups(fleet: Iterable[DeviceInfo]) -> list[list[DeviceInfo]]:
    """Ranks on CPUs in sets that share no core."""
    groups: list[list[DeviceInfo]] = []
    for info in fleet:
        if info.is_gpu:
            continue
        shared = [group for group in groups if any(_overlap(info, other) for other in group)]
        groups = [group for group in groups if group not in shared]
        groups.append([*(other for group in shared for other in group), info])
    return groups


def _overlap(one: DeviceInfo, other: DeviceInfo) -> bool:
    return one.host == other.host and not set(one.cores).isdisjoint(other.cores)


def _sentence(plan: Plan, group: list[DeviceInfo]) -> str:
    ranks = [info.rank for info in group]
    workers = [rank for rank in ranks if plan.is_worker(rank)]
    losers = [info for info in group if info.rank not in workers] or group
    cores = sorted({core for info in group for core in info.cores})
    limits = [info.usable_cores for info in group if info.usable_cores < len(info.cores)]
    usable = min([float(len(cores)), *limits])
    at_most = f", of which {usable:g} may be used" if usable < len(cores) else ""
    text = f"{_named(ranks)} compete for {plural(len(cores), 'core')} of one host ({ranges(cores)}{at_most})"
    return f"{text}: {_losses(plan, losers, group, usable)}; {_remedy(workers, ranks)}"


def _losses(plan: Plan, losers: list[DeviceInfo], group: list[DeviceInfo], usable: float) -> str:
    """What the primaries, or all ranks where there are none, have and would have alone."""
    alone = {info.rank: max(1, int(info.usable_cores)) for info in losers}
    text = ", ".join(
        f"{plan.role_of(info.rank)} {info.rank} computes with {plural(info.num_threads, 'thread')}"
        f" instead of {alone[info.rank]}"
        for info in losers
        if info.num_threads < alone[info.rank]
    )
    threads = sum(info.num_threads for info in group)
    turns = f"{threads} threads take turns" if threads > usable else ""
    return " and ".join(filter(None, (text, turns))) or "they share its memory bandwidth"


def _remedy(workers: list[int], ranks: list[int]) -> str:
    if len(workers) == len(ranks):
        return "use one attention worker here, or give the others hosts or GPUs of their own"
    if workers:
        return f"leave {_named(workers)} out of the plan, or give {'it' if len(workers) == 1 else 'each'} " + (
            "a host or GPU of its own"
        )
    return "use one primary here, or give the others hosts or GPUs of their own"


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranges(ranks)}"
