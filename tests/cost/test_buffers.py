"""Buffers of the ledger, compared with the tensors that are made, and counted for links, stages and shared devices."""

import random
from typing import Any

import msgspec
import pytest
import torch

from hetis.comm import collectives, shared_memory, shared_reduce
from hetis.comm.links.base import NUM_BUFFERS
from hetis.core.device_info import DeviceInfo
from hetis.core.placement import PoolId
from hetis.core.plan import AttentionWorker, Plan, Stage
from hetis.core.plan_sources import split_evenly
from hetis.cost import buffers, footprint, links
from hetis.cost.buffers import (
    COMMUNICATOR_BYTES,
    CUBLAS_BYTES,
    LIBRARY_BYTES,
    Buffers,
    buffers_of,
    scratch_bytes,
    sum_bytes,
    table_bytes,
)
from hetis.cost.limits import Limits
from hetis.cost.links import link_bytes, links_of, max_transfer_pages, message_bytes, transfer_bytes
from hetis.ranks.pool import PagePool
from hetis.ranks.sampling.draw import WEIGHTS_AT_ONCE
from hetis.ranks.wire import WireFormat
from hetis_kernels.paged_decode import decode_scratch_numel
from tests.core.test_plan import SPEC
from tests.cost.test_memory import GIB, fleet, ledger_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMITS = Limits(dtype="bfloat16", block_size=16, max_num_batched_tokens=64, max_num_seqs=4, max_model_len=512)


def random_limits(seed: int) -> Limits:
    draw = random.Random(seed)
    return Limits(
        dtype=draw.choice(list(DTYPES)),
        block_size=draw.choice([1, 4, 16, 24]),
        max_num_batched_tokens=draw.randrange(1, 3000),
        max_num_seqs=draw.randrange(1, 300),
        max_model_len=draw.choice([1, 200, 256, 257, 5000, 20_000]),
    )


def two_stages(sizes: tuple[int, int], num_workers: int, device: str = "cpu") -> Plan:
    """Layers 0 to 2 and 3 to 6 on so many primaries each, then attention workers."""
    stages, rank = [], 0
    for layers, size in zip(((0, 3), (3, 7)), sizes, strict=True):
        primaries = split_evenly(f"{size}+0", SPEC, device).primaries
        numbered = tuple(msgspec.structs.replace(each, rank=rank + each.rank) for each in primaries)
        stages.append(Stage(layers=layers, primaries=numbered))
        rank += size
    workers = tuple(AttentionWorker(rank=rank + index, device=device) for index in range(num_workers))
    return Plan(stages=tuple(stages), workers=workers)


def by_rank(infos: list[DeviceInfo], **changes: Any) -> dict[int, DeviceInfo]:
    return {info.rank: msgspec.structs.replace(info, **changes) for info in infos}


def on_hosts_of_their_own(infos: list[DeviceInfo]) -> dict[int, DeviceInfo]:
    return {info.rank: msgspec.structs.replace(info, host=str(info.rank)) for info in infos}


def gpus(plan: Plan, **changes: Any) -> list[DeviceInfo]:
    """A GPU for each rank, all on one host and all cuda:0."""
    fields = {"device": "cuda:0", "nccl": "2.28.9"} | changes
    return [msgspec.structs.replace(info, gpu=f"gpu {info.rank}", **fields) for info in fleet(plan, 8 * GIB)]


def all_buffers(plan: Plan, infos: dict[int, DeviceInfo], limits: Limits = LIMITS) -> list[Buffers]:
    return [buffers_of(SPEC, plan, infos, member, limits) for member in plan.members]


# --- sizes of single parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_buffers_are_as_large_as_the_tensors_that_are_made(seed: int) -> None:
    limits, groups = random_limits(seed), random.Random(seed).randrange(9)
    spec, lanes = SPEC, limits.max_num_decodes * groups
    wire = WireFormat(spec.queries_per_group, spec.head_dim, DTYPES[limits.dtype])
    pages = torch.empty(1, 2, 1, limits.block_size, spec.head_dim, dtype=DTYPES[limits.dtype]).nbytes
    pages *= max_transfer_pages(spec, limits.block_size, limits.dtype)
    assert message_bytes(spec, groups, limits) == (
        max(pages, wire.request_bytes(lanes, limits.max_num_batched_tokens * groups)),
        max(pages, wire.reply_bytes(lanes)),
    )
    numel = decode_scratch_numel(lanes, spec.queries_per_group, spec.head_dim, limits.max_model_len)
    assert scratch_bytes(spec, groups, limits) == 4 * numel
    pool = PagePool(
        PoolId(0, 0),
        num_layers=1,
        num_pages=1,
        page_size=limits.block_size,
        head_dim=spec.head_dim,
        num_lanes=limits.max_num_seqs * spec.num_head_groups,
        max_model_len=limits.max_model_len,
        dtype=DTYPES[limits.dtype],
        device=torch.device("cpu"),
    )
    assert table_bytes(spec, limits) == pool.table_host_BW.nbytes


def test_constants_are_those_of_the_parts_that_allocate() -> None:
    assert footprint.WEIGHTS_AT_ONCE == WEIGHTS_AT_ONCE
    assert (links.NUM_BUFFERS, links.SHARED_PAGE_BYTES) == (NUM_BUFFERS, shared_memory.PAGE_BYTES)
    assert (buffers.SUM_BUFFER_BYTES, buffers.COUNTER_BYTES) == (shared_reduce.BUFFER_BYTES, shared_memory.WORD_BYTES)
    assert collectives.SHARED_SUM_BYTES < buffers.SUM_BUFFER_BYTES


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_a_worker_has_a_page_table_and_messages_for_every_stage() -> None:
    plan, limits = two_stages((2, 1), 1), random_limits(0)
    apart = on_hosts_of_their_own(fleet(plan))
    messages = [message_bytes(SPEC, home.num_groups, limits) for _, home in plan.homes]
    tables, received_and_sent = 2 * table_bytes(SPEC, limits), sum(request + 2 * reply for request, reply in messages)
    worker = all_buffers(plan, apart, limits)[3]
    assert worker == Buffers(page_tables=tables, links=received_and_sent, sums=0, scratch=0, libraries=0)


def test_communicators_of_links_stages_and_handovers_are_counted() -> None:
    plan = two_stages((2, 2), 1, "cuda:0")
    of_primary, link = LIBRARY_BYTES + CUBLAS_BYTES, 2 * COMMUNICATOR_BYTES

    def libraries(infos: list[DeviceInfo]) -> list[int]:
        return [each.libraries for each in all_buffers(plan, by_rank(infos))]

    one_version = gpus(plan)
    assert libraries(one_version) == [
        *[of_primary + 2 * link + COMMUNICATOR_BYTES] * 4,  # to the worker, to the other stage, and the own stage
        LIBRARY_BYTES + 4 * link,
    ]
    other = [msgspec.structs.replace(info, nccl="2.29.3") if info.rank == 4 else info for info in one_version]
    assert libraries(other) == [*[of_primary + link + COMMUNICATOR_BYTES] * 4, LIBRARY_BYTES]
    on_one = [msgspec.structs.replace(info, gpu="the one") for info in one_version]
    assert libraries(on_one) == [*[of_primary] * 4, LIBRARY_BYTES], "over CPU memory"
    assert libraries(fleet(two_stages((2, 2), 1))) == [0] * 5, "CPUs need none"


def test_scratch_memory_is_counted_for_every_stage_of_a_gpu() -> None:
    plan = two_stages((2, 1), 1, "cuda:0")
    four, eight = (scratch_bytes(SPEC, groups, LIMITS) for groups in (4, 8))
    assert [each.scratch for each in all_buffers(plan, by_rank(gpus(plan)))] == [four, four, eight, four + eight]
    with_relays = two_stages((2, 1), 3)
    relay = 3 * transfer_bytes(SPEC, LIMITS)
    scratch = [each.scratch for each in all_buffers(with_relays, by_rank(fleet(with_relays)))]
    assert scratch == [relay] * 3 + [0] * 3, "homes relay pages from worker to worker"


# --- devices and hosts ------------------------------------------------------------------------------------------------


def test_ranks_share_the_memory_of_a_gpu_whatever_they_call_it() -> None:
    plan = split_evenly("1+1", SPEC, "cuda:0")
    apart = gpus(plan)
    one = [msgspec.structs.replace(info, gpu="one", device=f"cuda:{info.rank}") for info in apart]
    options = {"max_num_seqs": 10**5, "max_num_batched_tokens": 8}
    pages = [ledger_of(plan, infos, **options).num_pages[0] for infos in (apart, one)]
    assert 0 < pages[1] < 0.6 * pages[0]


def test_memory_between_two_cpus_of_a_host_is_counted_once() -> None:
    plan = split_evenly("1+1", SPEC, "cpu")
    [link] = links_of(SPEC, plan, 0, LIMITS)
    together = by_rank(fleet(plan))
    both_ways = 2 * (link.request_bytes + link.reply_bytes)
    assert both_ways <= link_bytes(link, 0, together) < both_ways + 5 * 4096, "whole pages, and one of counters"
    assert link_bytes(link, 1, together) == 0
    apart = on_hosts_of_their_own(fleet(plan))
    assert link_bytes(link, 0, apart) == 2 * link.request_bytes + link.reply_bytes
    assert link_bytes(link, 1, apart) == 2 * link.reply_bytes + link.request_bytes


def test_a_cpu_counts_the_memory_that_it_shares_with_a_gpu_s_host() -> None:
    plan = split_evenly("1+1", SPEC, ["cuda:0", "cpu"])
    [link] = links_of(SPEC, plan, 1, LIMITS)
    infos = by_rank(fleet(plan))
    assert link_bytes(link, 0, infos) == 2 * (link.request_bytes + link.reply_bytes), "on the GPU"
    assert link_bytes(link, 1, infos) == link_bytes(link, 0, by_rank(fleet(split_evenly("1+1", SPEC, "cpu"))))


def test_sums_need_memory_where_the_ranks_of_a_stage_are() -> None:
    """The first rank of the last stage gathers logits: 1003 values of 2 bytes for each of 128 rows."""
    logits, hidden = 128 * 1003 * 2, 64 * 64 * 2

    def sums(size: int, infos: dict[int, DeviceInfo] | None = None, device: str = "cpu") -> list[int]:
        plan = split_evenly(f"{size}+0", SPEC, device)
        infos = infos or by_rank(fleet(plan))
        return [sum_bytes(SPEC, plan, infos, primary, LIMITS) for primary in plan.primaries]

    assert sums(1) == [0]
    assert sums(2) == [4096 + 4 * 2**20 + logits, 0], "shared memory"
    assert sums(2, on_hosts_of_their_own(fleet(split_evenly("2+0", SPEC)))) == [2 * hidden + 2 * logits, 2 * hidden]
    of_three = 2 * 3 * 1366 * 2 + 1366 * (2 + 4)  # a share of 64 * 64 values is 1366
    assert sums(3, on_hosts_of_their_own(fleet(split_evenly("3+0", SPEC))))[1:] == [of_three] * 2
    on_gpus = gpus(split_evenly("2+0", SPEC, "cuda:0"))
    assert sums(2, by_rank(on_gpus), "cuda:0") == [2 * logits, 0], "NCCL sums in place"
    assert sums(2, by_rank(on_gpus, gpu="one"), "cuda:0") == [logits, 0], "in memory of the host"
    mixed = by_rank(on_gpus) | {1: by_rank(fleet(split_evenly("2+0", SPEC)))[1]}
    assert sums(2, mixed, "cuda:0") == [logits, 4096 + 4 * 2**20], "of which the rank on the CPU counts it"


def test_a_gpu_that_libraries_fill_is_refused() -> None:
    plan = split_evenly("1+0", SPEC, "cuda:0")
    small = [msgspec.structs.replace(info, free_memory=256 << 20) for info in gpus(plan)]
    with pytest.raises(ValueError, match="rank 0 on cuda:0"):
        ledger_of(plan, small)
