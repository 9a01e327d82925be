"""What a fleet is, in a few lines for the log of its start."""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from hetis.core.config import EngineConfig
from hetis.core.messages import Setup
from hetis.core.sizes import format_bytes, plural
from hetis.cost.footprint import page_bytes_of
from hetis.cost.memory import total_tokens

# In the other lines, or without effect on serving.
_SAID_ANYWAY = {
    "model",
    "plan",
    "dispatch",
    "measure",
    "progress",
    "kv_cache_memory",
}


class _Member(NamedTuple):
    """What members in one line have in common."""

    role: str
    device: str
    memory: str


def start_lines(config: EngineConfig, setup: Setup) -> list[str]:
    """Model, members with devices and KV memory, room for tokens, dispatch, and settings that are not the default."""
    spec = setup.spec
    tokens = total_tokens(spec, setup.plan, setup.num_pages, setup.block_size)
    return [
        f"model {config.model or 'in the package'}: {spec.num_layers} layers, {spec.num_query_heads} query heads, "
        f"{spec.num_head_groups} KV heads, {setup.dtype}",
        *_members(setup),
        f"KV cache: {tokens} tokens in all, at most {setup.max_model_len} in one sequence",
        f"dispatch {config.dispatch}; up to {setup.max_num_seqs} sequences and {setup.max_num_batched_tokens} tokens "
        f"in a step; {_changed(config)}",
    ]


def _members(setup: Setup) -> Iterable[str]:
    """One line for consecutive ranks that are alike."""
    alike: list[tuple[_Member, int]] = []
    for info, member in zip(setup.fleet, setup.plan.members, strict=True):
        page = page_bytes_of(setup.spec, setup.plan, member, setup.block_size, setup.dtype)
        kind = info.device.partition(":")[0]
        name = f"{info.name}, {plural(info.num_threads, 'thread')}" if kind == "cpu" else info.name
        memory = format_bytes(setup.num_pages[member.rank] * page)
        alike.append((_Member(setup.plan.role_of(member.rank), f"{kind} ({name})", memory), member.rank))
    for what, group in groupby(alike, key=lambda pair: pair[0]):
        ranks = [rank for _, rank in group]
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        each = "" if len(ranks) == 1 else " each"
        yield f"{who}: {what.role} on {what.device}, {what.memory} of KV cache{each}"


def _changed(config: EngineConfig) -> str:
    default = EngineConfig()
    changed = [
        f"{name} {getattr(config, name)}"
        for name in EngineConfig.__struct_fields__
        if name not in _SAID_ANYWAY and getattr(config, name) != getattr(default, name)
    ]
    return f"not the default: {', '.join(changed)}" if changed else "all else by default"
