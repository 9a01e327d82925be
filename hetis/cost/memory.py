"""The memory ledger: how the memory of every rank is used, and what contexts that allows. Pure functions of data.

Sizes are bytes unless their name says otherwise.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from hetis.core.device_info import DeviceInfo
from hetis.core.model_spec import ModelSpec
from hetis.core.placement import pages_for
from hetis.core.plan import Member, Plan, Primary
from hetis.core.sizes import format_bytes
from hetis.cost.buffers import buffers_of
from hetis.cost.cores import cores_of
from hetis.cost.footprint import activation_bytes, page_bytes_of, weight_bytes
from hetis.cost.limits import Limits
from hetis.cost.needs import Needs, does_not_fit, too_few_pages, too_long, usable_share

_COLUMNS = (
    *("rank", "role", "device", "threads", "cores"),
    *("free", "weights", "activations", "buffers", "KV", "pages", "tokens"),
)


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """How one rank uses memory. A worker has a pool per stage, a primary has one if it has head groups."""

    rank: int
    role: str
    device: str
    threads: int  # of a CPU rank's operators; 0 on a GPU
    cores: str  # that they may use: `cost/cores.py`
    free: int  # before anything is loaded; ranks that share a device see the same bytes
    weights: int
    activations: int
    buffers: int  # page tables, links, sums, scratch memory and libraries: `cost/buffers.py`
    kv: int
    page_bytes: int  # of one page in every pool of the rank
    pages: int  # of each pool
    tokens: int  # whole sequences' tokens whose lanes of this rank fit: all groups on a worker, its own on a primary


class MemoryLedger(msgspec.Struct, frozen=True, kw_only=True):
    """How memory is used, rank by rank. `str()` gives the table."""

    ranks: tuple[RankMemory, ...]  # in rank order
    largest_context: int  # tokens of the longest sequence that can run alone
    total_tokens: int  # of many sequences together, over the whole fleet

    @property
    def num_pages(self) -> dict[int, int]:
        """Rank -> pages of each of its pools."""
        return {rank.rank: rank.pages for rank in self.ranks}

    def __str__(self) -> str:
        lines = [[*_COLUMNS]]
        for rank in self.ranks:
            sizes = [format_bytes(size) for size in (rank.free, rank.weights, rank.activations, rank.buffers, rank.kv)]
            threads = [str(rank.threads), rank.cores] if rank.threads else ["-", "-"]
            who = [str(rank.rank), rank.role, rank.device, *threads]
            lines.append([*who, *sizes, str(rank.pages), str(rank.tokens)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(_padded(line, widths)) for line in lines]
        text.append(f"largest context {self.largest_context} tokens; room for {self.total_tokens} tokens in all")
        return "\n".join(text)


def _padded(line: Iterable[str], widths: Iterable[int]) -> list[str]:
    """Rank, role and device to the left, what follows to the right."""
    columns = enumerate(zip(line, widths, strict=True))
    return [text.ljust(width) if column < 3 else text.rjust(width) for column, (text, width) in columns]


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
    limits = Limits(
        dtype=dtype,
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=min(max_model_len or spec.max_position, spec.max_position),
    )
    infos = {info.rank: info for info in fleet}
    needs = [_needs_of(spec, plan, infos, member, limits) for member in plan.members]
    kv = _divide(needs)
    num_pages = {need.rank: kv[need.rank] // need.page_bytes for need in needs}
    context = min(largest_context(plan, num_pages, block_size), spec.max_position)
    ledger = MemoryLedger(
        ranks=tuple(_entry(plan, need, num_pages[need.rank], block_size) for need in needs),
        largest_context=context,
        total_tokens=total_tokens(spec, plan, num_pages, block_size),
    )
    refusal = next(
        (too_few_pages(need, kv[need.rank]) for need in needs if num_pages[need.rank] < need.least_pages), ""
    )
    if not refusal and max_model_len is not None and max_model_len > context:
        refusal = too_long(spec, plan, needs, num_pages, block_size, max_model_len, context)
    if refusal:
        raise ValueError(f"{refusal}\n{ledger}")
    return ledger


def _needs_of(spec: ModelSpec, plan: Plan, infos: Mapping[int, DeviceInfo], member: Member, limits: Limits) -> Needs:
    if isinstance(member, Primary):
        num_lanes, weights = member.num_groups, weight_bytes(spec, plan, member, limits.dtype)
        activations = activation_bytes(spec, plan, member, limits)
    else:  # computes inside its messages
        num_lanes, weights, activations = plan.num_groups, 0, 0
    page = page_bytes_of(spec, plan, member, limits.block_size, limits.dtype)
    return Needs(
        member=member,
        info=infos[member.rank],
        weights=weights,
        activations=activations,
        buffers=buffers_of(spec, plan, infos, member, limits).total,
        page_bytes=page,
        num_lanes=num_lanes,
        most_kv=page * limits.max_num_seqs * pages_for(limits.max_model_len, limits.block_size) * num_lanes,
    )


def _entry(plan: Plan, need: Needs, num_pages: int, block_size: int) -> RankMemory:
    return RankMemory(
        rank=need.rank,
        role=plan.role_of(need.rank),
        device=need.info.device,
        threads=0 if need.info.is_gpu else need.info.num_threads,
        cores="" if need.info.is_gpu else cores_of(need.info),
        free=need.info.free_memory,
        weights=need.weights,
        activations=need.activations,
        buffers=need.buffers,
        kv=num_pages * need.page_bytes,
        page_bytes=need.page_bytes,
        pages=num_pages,
        tokens=num_pages // max(1, need.num_lanes) * block_size,
    )


def _divide(needs: Iterable[Needs]) -> dict[int, int]:
    """KV memory by rank, in bytes. ValueError for what does not fit."""
    shared: dict[tuple[str, str], list[Needs]] = defaultdict(list)
    for need in needs:
        shared[need.info.place].append(need)
    return {rank: kv for members in shared.values() for rank, kv in _divide_device(members).items()}


def _divide_device(needs: Sequence[Needs]) -> dict[int, int]:
    """KV memory of ranks that draw on the same free memory. Those that can use none get none."""
    free = min(need.info.free_memory for need in needs)
    share = 1.0 if all(need.member.kv_memory is not None for need in needs) else usable_share(needs[0].info.device)
    given = {need.rank: need.member.kv_memory for need in needs if need.most_kv and need.member.kv_memory is not None}
    others = [need for need in needs if need.most_kv and need.rank not in given]
    left = int(free * share) - sum(need.fixed for need in needs) - sum(given.values())
    if left < 0:
        raise ValueError(does_not_fit(needs, sum(given.values()), free, share))
    rest = {need.rank: min(left // len(others), need.most_kv) for need in others}
    return dict.fromkeys((need.rank for need in needs), 0) | given | rest


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
