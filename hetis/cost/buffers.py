"""Bytes of a rank besides weights, activations and KV pages: page tables, buffers of links and of sums over ranks,
scratch memory of attention, and what libraries take of a GPU. Pure functions of plan, model and devices.

What NCCL, cuBLAS and CUDA take is an estimate from their documentation: it has not been measured. Only memory of the
rank's own device is counted: not what GPU ranks have on their host. The index arrays of a step (some hundred bytes per
token) and memory for measuring speeds before the first step are left to the share of the device that is not planned.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hetis.core.device_info import DeviceInfo, joined_by_nccl
from hetis.core.model_spec import ModelSpec
from hetis.core.placement import pages_for
from hetis.core.plan import Member, Plan, Primary
from hetis.cost.footprint import FLOAT32_BYTES, hidden_bytes, logit_rows
from hetis.cost.limits import Limits
from hetis.cost.links import SHARED_PAGE_BYTES, PlannedLink, aligned, link_bytes, links_of, transfer_bytes

COMMUNICATOR_BYTES = 64 << 20  # of NCCL, between GPUs over PCIe; on machines with NVLink it may take up to 512 MiB
CUBLAS_BYTES = 32 << 20  # workspace of one stream at compute capability 9.0; 8 MiB before
LIBRARY_BYTES = 256 << 20  # code that CUDA loads after a rank has reported its free memory
SUM_BUFFER_BYTES = 1 << 20  # of sums through shared memory, two for each rank
COUNTER_BYTES = 128  # of sums through shared memory, two for each rank
_COMMUNICATORS_OF_LINK = 2  # one for each direction
_MIN_SPLIT, _MAX_SPLITS = 256, 32  # as in kernels/paged_decode.py: least tokens of a piece, most pieces


class Buffers(NamedTuple):
    """Bytes by purpose."""

    page_tables: int
    links: int
    sums: int  # over the ranks of a stage, and their logits side by side
    scratch: int  # of attention, and pages on their way from worker to worker
    libraries: int

    @property
    def total(self) -> int:
        return sum(self)


def buffers_of(spec: ModelSpec, plan: Plan, infos: Mapping[int, DeviceInfo], member: Member, limits: Limits) -> Buffers:
    """The buffers of one rank on its device. `infos`: by rank."""
    links = links_of(spec, plan, member.rank, limits)
    num_pools = 1 if isinstance(member, Primary) else len(plan.stages)
    return Buffers(
        page_tables=num_pools * table_bytes(spec, limits),
        links=sum(link_bytes(link, member.rank, infos) for link in links),
        sums=sum_bytes(spec, plan, infos, member, limits) if isinstance(member, Primary) else 0,
        scratch=_scratch_bytes(spec, plan, infos[member.rank], member, limits),
        libraries=_library_bytes(plan, infos, member, links) if infos[member.rank].is_gpu else 0,
    )


def table_bytes(spec: ModelSpec, limits: Limits) -> int:
    """The page table of one pool: int32, for each lane of each slot the pages of the longest sequence."""
    return 4 * limits.max_num_seqs * spec.num_head_groups * pages_for(limits.max_model_len, limits.block_size)


def sum_bytes(spec: ModelSpec, plan: Plan, infos: Mapping[int, DeviceInfo], primary: Primary, limits: Limits) -> int:
    """Sums over the primaries of a stage, and the logits of all vocabulary rows on the one that samples.

    Ranks of one host that NCCL does not join sum through shared memory, which is counted at the first one on the CPU.
    Others sum in a group, where each holds the parts of all; only two that NCCL joins leave that to it. A GPU outside
    NCCL takes part with a copy in host memory (`hetis.comm.collectives`).
    """
    stage_index, tp_index = plan.position_of(primary.rank)
    members = [infos[rank] for rank in plan.stages[stage_index].ranks]
    size = len(members)
    if size == 1:
        return 0
    over_nccl = joined_by_nccl(members)
    over_memory = not over_nccl and len({member.host for member in members}) == 1
    in_group = over_nccl or not (over_memory or infos[primary.rank].is_gpu)
    total = 0
    if over_memory and primary.rank == next((member.rank for member in members if not member.is_gpu), None):
        total += aligned(2 * size * COUNTER_BYTES, SHARED_PAGE_BYTES) + 2 * size * SUM_BUFFER_BYTES
    if in_group and not (over_nccl and size == 2):
        total += _parts_bytes(hidden_bytes(spec, limits), size, limits.value_bytes)
    if plan.is_last(stage_index) and tp_index == 0:
        total += logit_rows(limits) * spec.vocab_size * limits.value_bytes * (2 if in_group else 1)
    return total


def scratch_bytes(spec: ModelSpec, num_groups: int, limits: Limits) -> int:
    """Results of the pieces of long lanes in decode attention on a GPU: out and lse2 of each, in float32."""
    pieces = min(_MAX_SPLITS, max(1, -(-limits.max_model_len // _MIN_SPLIT)))
    return FLOAT32_BYTES * limits.max_num_decodes * num_groups * pieces * spec.queries_per_group * (spec.head_dim + 1)


def _parts_bytes(num_bytes: int, size: int, value_bytes: int) -> int:
    """A sum of `num_bytes` in a group: both parts; of more ranks a share of each, the whole, and the share's sum."""
    if size == 2:
        return 2 * num_bytes
    share = -(-num_bytes // (value_bytes * size))  # values
    return 2 * size * share * value_bytes + share * (value_bytes + FLOAT32_BYTES)


def _scratch_bytes(spec: ModelSpec, plan: Plan, info: DeviceInfo, member: Member, limits: Limits) -> int:
    """A primary's own; a worker has one per stage, for the largest home. Homes relay pages between workers as well."""
    if not isinstance(member, Primary):
        largest = (max(home.num_groups for home in stage.homes) for stage in plan.stages)
        return sum(scratch_bytes(spec, groups, limits) for groups in largest) if info.is_gpu else 0
    relays = len(plan.workers) * transfer_bytes(spec, limits) if member.num_groups and len(plan.workers) > 1 else 0
    return relays + (scratch_bytes(spec, member.num_groups, limits) if info.is_gpu else 0)


def _library_bytes(plan: Plan, infos: Mapping[int, DeviceInfo], member: Member, links: Iterable[PlannedLink]) -> int:
    """What CUDA, cuBLAS and NCCL take of a GPU."""
    own = infos[member.rank]
    joined = sum(joined_by_nccl((own, infos[link.other(member.rank)])) for link in links)
    total = LIBRARY_BYTES + _COMMUNICATORS_OF_LINK * COMMUNICATOR_BYTES * joined
    if isinstance(member, Primary):
        ranks = plan.stage_of(member).ranks
        is_split = len(ranks) > 1 and joined_by_nccl([infos[rank] for rank in ranks])
        total += CUBLAS_BYTES + COMMUNICATOR_BYTES * is_split
    return total
