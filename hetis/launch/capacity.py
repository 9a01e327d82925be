"""Whether this host has room for the processes of a fleet, checked before one of them starts."""

from hetis.core.plan import Plan
from hetis.core.sizes import format_bytes
from hetis.processes.limits import Memory, usable_cores, usable_memory

# Memory of a rank before it loads: torch 2.13 takes 154-171 MiB (USS) that no other process shares.
RANK_BYTES = 160 << 20
RANKS_PER_CORE = 8  # beyond that, starting takes minutes and ranks miss their heartbeats
ALWAYS = 8  # ranks that are allowed on any number of cores


def check_processes(plan: Plan) -> None:
    """Raises ValueError, with the numbers, where this host is too small for all ranks of the plan."""
    reason = why_too_many(plan, usable_memory(), usable_cores())
    if reason is not None:
        raise ValueError(f"{reason}; use fewer ranks, or allow it by --oversubscribe (oversubscribe=True).")


def why_too_many(plan: Plan, memory: Memory, cores: float) -> str | None:
    """None where the plan's ranks fit. Ranks on GPUs do not count against the cores."""
    count = plan.world_size
    if count * RANK_BYTES > memory.available:
        return (
            f"the plan has {count} ranks, each a process of {format_bytes(RANK_BYTES)} before it holds anything, "
            f"together {format_bytes(count * RANK_BYTES)}, but {format_bytes(memory.available)} of memory are free here"
        )
    on_cpu = sum(not member.device.startswith("cuda") for member in plan.members)
    most = max(ALWAYS, int(RANKS_PER_CORE * cores))
    if on_cpu > most:
        return f"the plan has {on_cpu} ranks on the CPU, but {most} at most are allowed on the {cores:g} cores here"
    return None
