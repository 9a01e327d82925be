"""The memory ledger: what every rank's memory is used for, and what contexts that allows. Pure functions of data.

Sizes are bytes unless their name says otherwise.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import ceil, floor

import msgspec

from hetis.core.device_info import DeviceInfo
from hetis.core.model_spec import ModelSpec
from hetis.core.placement import pages_for
from hetis.core.plan import AttentionWorker, Plan, Primary
from hetis.core.sizes import format_bytes, plural
from hetis.cost.buffers import Limits, buffer_bytes
from hetis.cost.footprint import fixed_bytes, page_bytes_of

GPU_SHARE = 0.9  # of free memory that hetis takes when no KV memory is given: the rest is for kernels' own needs
CPU_SHARE = 0.5  # a host has other things to do, and its page cache holds the checkpoint


class LedgerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One rank. A worker has one pool per stage, each of `pages` pages; a primary has one if it has head groups."""

    rank: int
    role: str
    device: str
    free: int  # before anything is loaded; ranks that share a device see the same bytes
    weights: int
    activations: int
    buffers: int  # page tables, messages, and what a GPU's libraries need
    kv: int
    page_bytes: int  # of one page in every pool of the rank
    pages: int
    tokens: int  # whole sequences' tokens whose lanes of this rank fit: all groups on a worker, its own on a primary


class MemoryLedger(msgspec.Struct, frozen=True, kw_only=True):
    """What fits where. `str()` gives the table."""

    rows: tuple[LedgerRow, ...]  # in rank order
    largest_context: int  # tokens of the longest sequence that can run alone
    total_tokens: int  # of many sequences together, over the whole fleet

    @property
    def num_pages(self) -> dict[int, int]:
        """Rank -> pages of each of its pools."""
        return {row.rank: row.pages for row in self.rows}

    def __str__(self) -> str:
        cells = [["rank", "role", "device", "free", "weights", "activations", "buffers", "KV", "pages", "tokens"]]
        for row in self.rows:
            sizes = [format_bytes(size) for size in (row.free, row.weights, row.activations, row.buffers, row.kv)]
            cells.append([str(row.rank), row.role, row.device, *sizes, str(row.pages), str(row.tokens)])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        ]
        lines.append(f"largest context {self.largest_context} tokens; room for {self.total_tokens} tokens in all")
        return "\n".join(lines)


def plan_memory(
    spec: ModelSpec,
    plan: Plan,
    fleet: Sequence[DeviceInfo],
    *,
    dtype: str,
    block_size: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int | None = None,
) -> MemoryLedger:
    """The ledger of a fleet. Ranks without `kv_memory` share what is left on their device, up to what could be used.

    Raises ValueError, one sentence and the ledger, when weights, activations and KV memory do not fit a device, when KV
    memory gives less than one page per lane, and when a context of `max_model_len` tokens cannot be held.
    """
    infos = {info.rank: info for info in fleet}
    fixed = {
        member.rank: fixed_bytes(spec, plan, member, dtype, max_num_batched_tokens, max_num_seqs, max_model_len)
        for member in plan.members
    }
    page = {member.rank: page_bytes_of(spec, plan, member, block_size, dtype) for member in plan.members}
    longest = min(max_model_len or spec.max_position, spec.max_position)
    limits = Limits(
        dtype=dtype,
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=longest,
    )
    buffers = {member.rank: buffer_bytes(spec, plan, infos, member, limits) for member in plan.members}
    most_pages = max_num_seqs * pages_for(longest, block_size)  # for one lane of each sequence
    useful = {member.rank: page[member.rank] * most_pages * _num_lanes(spec, member) for member in plan.members}
    kv, refusals = _divide(plan, infos, {rank: sum(fixed[rank]) + buffers[rank] for rank in fixed}, useful)
    if refusals:  # a table of what does not exist would not explain it
        raise ValueError(refusals[0])
    num_pages = {rank: kv[rank] // page[rank] for rank in kv}
    context = min(largest_context(plan, num_pages, block_size), spec.max_position)
    ledger = MemoryLedger(
        rows=_rows(spec, plan, infos, fixed, buffers, page, num_pages, block_size),
        largest_context=context,
        total_tokens=total_tokens(spec, plan, num_pages, block_size),
    )
    refusals = _too_few_pages(plan, infos, kv, page, num_pages)
    if max_model_len is not None and max_model_len > context:
        refusals.append(_too_long(spec, plan, infos, page, num_pages, block_size, max_model_len))
    if refusals:
        raise ValueError(f"{refusals[0]}\n{ledger}")
    return ledger


def _rows(
    spec: ModelSpec,
    plan: Plan,
    infos: Mapping[int, DeviceInfo],
    fixed: Mapping[int, tuple[int, int]],
    buffers: Mapping[int, int],
    page: Mapping[int, int],
    num_pages: Mapping[int, int],
    block_size: int,
) -> tuple[LedgerRow, ...]:
    """`fixed`: bytes of weights and activations; `page`: bytes of a page in every pool of a rank."""
    return tuple(
        LedgerRow(
            rank=member.rank,
            role=plan.role_of(member.rank),
            device=infos[member.rank].device,
            free=infos[member.rank].free_memory,
            weights=fixed[member.rank][0],
            activations=fixed[member.rank][1],
            buffers=buffers[member.rank],
            kv=num_pages[member.rank] * page[member.rank],
            page_bytes=page[member.rank],
            pages=num_pages[member.rank],
            tokens=num_pages[member.rank] // max(1, _num_lanes(spec, member)) * block_size,
        )
        for member in plan.members
    )


def usable_share(device: str) -> float:
    """Of a device's free memory, what hetis takes if it is not told."""
    return CPU_SHARE if device == "cpu" else GPU_SHARE


def largest_context(plan: Plan, num_pages: Mapping[int, int], block_size: int) -> int:
    """The longest sequence, in tokens, for which a placement exists in the empty fleet.

    While the prompt of a sequence is computed each home holds pages for all tokens of its head groups (after a
    preemption for the output as well), also where the lanes live elsewhere: staging. So groups * pages(n) <= its pages.
    Then the lanes may live there too, on those same pages. Attention workers let more sequences run, not longer ones.
    """
    return min(num_pages[home.rank] // home.num_groups * block_size for _, home in plan.homes)


def total_tokens(spec: ModelSpec, plan: Plan, num_pages: Mapping[int, int], block_size: int) -> int:
    """Tokens of all sequences together that the fleet holds: the least over the stages, pages being free to place."""
    on_workers = sum(num_pages[rank] for rank in plan.worker_ranks)
    return min(
        (sum(num_pages[home.rank] for home in stage.homes) + on_workers) // spec.num_head_groups * block_size
        for stage in plan.stages
    )


def _num_lanes(spec: ModelSpec, member: Primary | AttentionWorker) -> int:
    """Lanes of one sequence (per stage) that may need pages of a rank."""
    return member.num_groups if isinstance(member, Primary) else spec.num_head_groups


def _divide(
    plan: Plan, infos: Mapping[int, DeviceInfo], fixed: Mapping[int, int], useful: Mapping[int, int]
) -> tuple[dict[int, int], list[str]]:
    """KV memory of every rank, and what does not fit. Ranks that share a device draw on the same free memory.

    A rank for which none is `useful` gets none.
    """
    shared: dict[tuple[str, str], list[Primary | AttentionWorker]] = defaultdict(list)
    for member in plan.members:
        shared[infos[member.rank].place].append(member)
    kv: dict[int, int] = dict.fromkeys(infos, 0)
    refusals: list[str] = []
    for members in shared.values():
        device = infos[members[0].rank].device
        free = min(infos[member.rank].free_memory for member in members)
        needed = sum(fixed[member.rank] for member in members)
        takers = [member for member in members if useful[member.rank]]
        given = {member.rank: member.kv_memory for member in takers if member.kv_memory is not None}
        others = [member.rank for member in takers if member.rank not in given]
        share = 1.0 if all(member.kv_memory is not None for member in members) else usable_share(device)
        left = int(free * share) - needed - sum(given.values())
        if left < 0:
            refusals.append(_does_not_fit(device, members, needed, sum(given.values()), free, share))
        kv |= given | {rank: min(max(left, 0) // len(others), useful[rank]) for rank in others}
    return kv, refusals


def _does_not_fit(
    device: str, members: Sequence[Primary | AttentionWorker], needed: int, given: int, free: int, share: float
) -> str:
    ranks = f"{'ranks' if len(members) > 1 else 'rank'} {', '.join(str(member.rank) for member in members)} on {device}"
    left = int(free * share) - needed
    if left > 0:  # only the KV memory is too much
        of_each = " together" if len(members) > 1 else ""
        return (
            f"--kv-cache-memory (or kv_memory in the plan) gives {ranks} {format_bytes(given)}{of_each}, which is more "
            f"than the {format_bytes(left)} that are left there: {format_bytes(free)} are free, and weights, "
            f"activations and buffers take {format_bytes(needed)}. Give at most {format_bytes(left, floor)}{of_each}."
        )
    return (
        f"{ranks}: {format_bytes(needed)} of weights, activations and buffers do not fit into {share:.0%} of "
        f"{format_bytes(free)} free memory; give layers, head groups or columns to other ranks, or lower "
        f"max_num_batched_tokens."
    )


def _too_few_pages(
    plan: Plan,
    infos: Mapping[int, DeviceInfo],
    kv: Mapping[int, int],
    page: Mapping[int, int],
    num_pages: Mapping[int, int],
) -> list[str]:
    """What is said of ranks without one page for every lane that they are home of, or, on a worker, one page at all."""
    refusals = []
    for member in plan.members:
        rank = member.rank
        least = member.num_groups if isinstance(member, Primary) else 1
        if num_pages[rank] < least:
            refusals.append(
                f"rank {rank} on {infos[rank].device} has {format_bytes(kv[rank])} for KV, which is {num_pages[rank]} "
                f"pages of {format_bytes(page[rank])}, but needs at least {least}, one per head group that it is home "
                f"of; give it {format_bytes(least * page[rank], ceil)} or more, or lower the block size."
            )
    return refusals


def _too_long(
    spec: ModelSpec,
    plan: Plan,
    infos: Mapping[int, DeviceInfo],
    page: Mapping[int, int],
    num_pages: Mapping[int, int],
    block_size: int,
    wanted: int,
) -> str:
    if wanted > spec.max_position:
        return f"max_model_len is {wanted}, but the model has {spec.max_position} positions; lower max_model_len."
    tightest = min(
        (home for _, home in plan.homes),
        key=lambda home: num_pages[home.rank] // home.num_groups,
    )
    least = pages_for(wanted, block_size) * tightest.num_groups * page[tightest.rank]
    given = "as given"
    if tightest.kv_memory is None:
        given = f"what the rest leaves of {usable_share(infos[tightest.rank].device):.0%} of the free memory"
    context = largest_context(plan, num_pages, block_size)
    has = format_bytes(num_pages[tightest.rank] * page[tightest.rank])
    return (
        f"max_model_len is {wanted}, but the largest context is {context}: rank {tightest.rank} has {has} of KV memory "
        f"({given}) for {plural(tightest.num_groups, 'head group')}; give it {format_bytes(least, ceil)} by "
        f"--kv-cache-memory (or kv_memory in the plan), or lower max_model_len."
    )
