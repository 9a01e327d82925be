"""The lines that describe a fleet in the log of its start."""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from hetis.core.config import EngineConfig
from hetis.core.messages import Setup
from hetis.core.sizes import format_bytes
from hetis.cost.cores import threads_of
from hetis.cost.footprint import page_bytes_of
from hetis.cost.memory import total_tokens

# Settings that other lines show, or that do not change serving.
_NOT_LISTED = {
    "model",
    "plan",
    "dispatch",
    "progress",
    "kv_cache_memory",
}


class _Kind(NamedTuple):
    """The properties that members in one line have in common."""

    role: str
    device: str
    memory: str


def start_lines(config: EngineConfig, setup: Setup) -> list[str]:
    """Model, members with devices and KV memory, capacity in tokens, dispatch, settings that are not the default."""
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
    """One line for each run of consecutive ranks of one kind."""
    kinds: list[tuple[_Kind, int]] = []
    for info, member in zip(setup.fleet, setup.plan.members, strict=True):
        page = page_bytes_of(setup.spec, setup.plan, member, setup.block_size, setup.dtype)
        device = info.device.partition(":")[0]
        name = f"{info.name}, {threads_of(info)}" if device == "cpu" else info.name
        memory = format_bytes(setup.num_pages[member.rank] * page)
        kinds.append((_Kind(setup.plan.role_of(member.rank), f"{device} ({name})", memory), member.rank))
    for kind, group in groupby(kinds, key=lambda pair: pair[0]):
        ranks = [rank for _, rank in group]
        names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        each = "" if len(ranks) == 1 else " each"
        yield f"{names}: {kind.role} on {kind.device}, {kind.memory} of KV cache{each}"


def _changed(config: EngineConfig) -> str:
    default = EngineConfig()
    changed = [
        f"{name} {getattr(config, name)}"
        for name in EngineConfig.__struct_fields__
        if name not in _NOT_LISTED and getattr(config, name) != getattr(default, name)
    ]
    return f"not the default: {', '.join(changed)}" if changed else "all else by default"
