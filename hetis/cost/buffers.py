"""How many bytes a rank needs besides weights, activations and KV pages: page tables, messages, and on a GPU memory for
decode attention and for libraries. Pure functions of plan, model and devices.

All of it is allocated before the pools, or when ranks meet and warm up, so a rank that is `Ready` has it. What NCCL,
cuBLAS and CUDA take is an estimate from their documentation: it has not been measured.

G head groups of a home, M query heads per group, D head_dim, S tokens per page.
"""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from hetis.core.device_info import DeviceInfo, joined_by_nccl
from hetis.core.model_spec import DTYPE_BYTES, ModelSpec
from hetis.core.placement import pages_for
from hetis.core.plan import AttentionWorker, Plan, Primary
from hetis.cost.footprint import page_bytes

HAUL_BYTES = 1 << 20  # of lanes on the move, that a link carries with a message at most
COMMUNICATOR_BYTES = 64 << 20  # of NCCL, between GPUs over PCIe; on machines with NVLink it may take up to 512 MiB
CUBLAS_BYTES = 32 << 20  # workspace of one stream at compute capability 9.0; 8 MiB before
LIBRARY_BYTES = 256 << 20  # code that CUDA loads after a rank has reported its free memory
_NUM_SLOTS = 2  # messages in either direction of a link
_NUM_GROUPS = 2  # of NCCL for a link, one for each direction
_MIN_SPLIT, _MAX_SPLITS = 256, 32  # as in kernels/paged_decode.py: tokens of a piece at least, pieces at most


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    dtype: str
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int

    @property
    def max_num_decodes(self) -> int:
        return min(self.max_num_seqs, self.max_num_batched_tokens)


def buffer_bytes(
    spec: ModelSpec, plan: Plan, infos: Mapping[int, DeviceInfo], member: Primary | AttentionWorker, limits: Limits
) -> int:
    """Of one rank, on its device."""
    is_primary, info = isinstance(member, Primary), infos[member.rank]
    links = _links(spec, plan, member, limits)
    total = sum(link.num_bytes for link in links if link.is_first or not _share_memory(info, infos[link.peer]))
    total += (1 if is_primary else len(plan.stages)) * table_bytes(spec, limits)
    if info.is_gpu:
        total += _scratch_bytes(spec, plan, member, limits) + LIBRARY_BYTES + (CUBLAS_BYTES if is_primary else 0)
        total += COMMUNICATOR_BYTES * _num_communicators(plan, infos, member, [link.peer for link in links])
    return total


def table_bytes(spec: ModelSpec, limits: Limits) -> int:
    """The page table of one pool: int32, a row for each lane."""
    return 4 * limits.max_num_seqs * spec.num_head_groups * pages_for(limits.max_model_len, limits.block_size)


def message_bytes(spec: ModelSpec, num_groups: int, limits: Limits) -> tuple[int, int]:
    """Largest messages on a link of a home with so many groups, (to a worker, to the home).

    A request holds all lanes and all prompt tokens, a reply the output of all lanes; or it is pages of one layer.
    """
    value, queries, head_dim = DTYPE_BYTES[limits.dtype], spec.queries_per_group, spec.head_dim
    lanes, prompt = limits.max_num_decodes * num_groups, limits.max_num_batched_tokens * num_groups
    request = (lanes * (queries + 2) * head_dim + prompt * 2 * head_dim) * value
    reply = lanes * queries * head_dim * value
    one_layer = page_bytes(spec, 1, limits.block_size, limits.dtype)
    pages = pages_per_haul(spec, limits.block_size, limits.dtype) * one_layer
    return max(request, pages), max(reply, pages)


def pages_per_haul(spec: ModelSpec, block_size: int, dtype: str) -> int:
    """Most pages of lanes on the move in a message: of one layer."""
    return max(1, HAUL_BYTES // page_bytes(spec, 1, block_size, dtype))


def scratch_bytes(spec: ModelSpec, num_groups: int, limits: Limits) -> int:
    """For pieces of long lanes in decode attention: out and lse2 of each, in float32."""
    pieces = min(_MAX_SPLITS, max(1, -(-limits.max_model_len // _MIN_SPLIT)))
    return 4 * limits.max_num_decodes * num_groups * pieces * spec.queries_per_group * (spec.head_dim + 1)


def _scratch_bytes(spec: ModelSpec, plan: Plan, member: Primary | AttentionWorker, limits: Limits) -> int:
    """A primary's own; a worker has one per stage, for the largest home."""
    if isinstance(member, Primary):
        return scratch_bytes(spec, member.num_groups, limits)
    largest = (max(home.num_groups for home in stage.homes) for stage in plan.stages)
    return sum(scratch_bytes(spec, groups, limits) for groups in largest)


class _Link(NamedTuple):
    peer: int
    num_bytes: int  # of all messages on their way, both ways
    is_first: bool  # the end that makes the memory of a link inside a host


def _links(spec: ModelSpec, plan: Plan, member: Primary | AttentionWorker, limits: Limits) -> list[_Link]:
    def to_workers(num_groups: int) -> int:
        return _NUM_SLOTS * sum(message_bytes(spec, num_groups, limits))

    if not isinstance(member, Primary):
        homes = [home for home, worker in plan.links() if worker.rank == member.rank]
        return [_Link(home.rank, to_workers(home.num_groups), False) for home in homes]
    hidden = _NUM_SLOTS * limits.max_num_batched_tokens * spec.hidden_size * DTYPE_BYTES[limits.dtype]
    links = [_Link(receiver, hidden, True) for sender, receiver in plan.handovers() if sender == member.rank]
    links += [_Link(sender, hidden, False) for sender, receiver in plan.handovers() if receiver == member.rank]
    workers = [worker for home, worker in plan.links() if home.rank == member.rank]
    return links + [_Link(worker.rank, to_workers(member.num_groups), True) for worker in workers]


def _share_memory(one: DeviceInfo, other: DeviceInfo) -> bool:
    """Whether a link between the two is one memory for both."""
    return not one.is_gpu and not other.is_gpu and one.host == other.host


def _num_communicators(
    plan: Plan, infos: Mapping[int, DeviceInfo], member: Primary | AttentionWorker, peers: list[int]
) -> int:
    links = sum(joined_by_nccl((infos[member.rank], infos[peer])) for peer in peers)
    is_split = False
    if isinstance(member, Primary):
        stage = plan.stages[plan.position_of(member.rank)[0]]
        is_split = len(stage.primaries) > 1 and joined_by_nccl([infos[primary.rank] for primary in stage.primaries])
    return _NUM_GROUPS * links + is_split
