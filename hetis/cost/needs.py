"""What a rank needs of its device's memory, and the sentences for users whose plan does not fit."""

from collections.abc import Mapping, Sequence
from math import ceil, floor

import msgspec

from hetis.core.device_info import DeviceInfo
from hetis.core.model_spec import ModelSpec
from hetis.core.placement import pages_for
from hetis.core.plan import Member, Plan, Primary
from hetis.core.sizes import format_bytes, plural

GPU_SHARE = 0.9  # of free memory that hetis plans with when no KV memory is given: the rest is for kernels' own needs
CPU_SHARE = 0.5  # a host has other things to do, and its page cache holds the checkpoint


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """One rank before KV memory is divided. Sizes are bytes."""

    member: Member
    info: DeviceInfo
    weights: int
    activations: int
    buffers: int
    page_bytes: int  # of one page in every pool of the rank
    num_lanes: int  # of one sequence and stage, that may need pages of the rank
    most_kv: int  # that sequences can make use of

    @property
    def rank(self) -> int:
        return self.member.rank

    @property
    def fixed(self) -> int:
        """All but KV."""
        return self.weights + self.activations + self.buffers

    @property
    def least_pages(self) -> int:
        """One for every head group that a primary is home of; one on a worker."""
        return self.num_lanes if isinstance(self.member, Primary) else 1

    @property
    def least_kv(self) -> int:
        return self.least_pages * self.page_bytes


def usable_share(device: str) -> float:
    """Share of a device's free memory that hetis plans with where no KV memory is given."""
    return CPU_SHARE if device == "cpu" else GPU_SHARE


def does_not_fit(needs: Sequence[Needs], given: int, free: int, share: float) -> str:
    """The refusal for ranks of one device. `given`: bytes of KV memory; `share`: of `free` bytes, that may be used."""
    device, needed = needs[0].info.device, sum(need.fixed for need in needs)
    ranks = f"{'ranks' if len(needs) > 1 else 'rank'} {', '.join(str(need.rank) for need in needs)} on {device}"
    left = int(free * share) - needed
    if left > 0:  # only the KV memory is too much
        of_each = " together" if len(needs) > 1 else ""
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


def too_few_pages(need: Needs, kv: int) -> str:
    """The refusal for a rank with `kv` bytes, which are less than `least_pages`."""
    return (
        f"rank {need.rank} on {need.info.device} has {format_bytes(kv)} for KV, which is {kv // need.page_bytes} "
        f"pages of {format_bytes(need.page_bytes)}, but needs at least {need.least_pages}, one per head group that it "
        f"is home of; give it {format_bytes(need.least_kv, ceil)} or more, or lower the block size."
    )


def too_long(
    spec: ModelSpec,
    plan: Plan,
    needs: Sequence[Needs],
    num_pages: Mapping[int, int],
    block_size: int,
    wanted: int,
    context: int,
) -> str:
    """The refusal of a context of `wanted` tokens where `context` is the largest."""
    if wanted > spec.max_position:
        return f"max_model_len is {wanted}, but the model has {spec.max_position} positions; lower max_model_len."
    _, tightest = min(plan.homes, key=lambda home: num_pages[home[1].rank] // home[1].num_groups)
    need = next(need for need in needs if need.rank == tightest.rank)
    least = pages_for(wanted, block_size) * tightest.num_groups * need.page_bytes
    given = "as given"
    if tightest.kv_memory is None:
        given = f"what the rest leaves of {usable_share(need.info.device):.0%} of the free memory"
    has = format_bytes(num_pages[need.rank] * need.page_bytes)
    return (
        f"max_model_len is {wanted}, but the largest context is {context}: rank {need.rank} has {has} of KV memory "
        f"({given}) for {plural(tightest.num_groups, 'head group')}; give it {format_bytes(least, ceil)} by "
        f"--kv-cache-memory (or kv_memory in the plan), or lower max_model_len."
    )
