"""What ranks need besides weights, activations and pages, against the tensors that they make."""

import random
from typing import Any

import msgspec
import pytest
import torch

from hetis.core.device_info import DeviceInfo
from hetis.core.placement import PoolId
from hetis.core.plan import AttentionWorker, Plan, Stage, split_evenly
from hetis.cost import footprint
from hetis.cost.buffers import (
    COMMUNICATOR_BYTES,
    CUBLAS_BYTES,
    LIBRARY_BYTES,
    Limits,
    buffer_bytes,
    message_bytes,
    pages_per_haul,
    scratch_bytes,
    table_bytes,
)
from hetis.ranks.pool import PagePool
from hetis.ranks.sampling.draw import WEIGHTS_AT_ONCE
from hetis.ranks.wire import WireFormat
from hetis_kernels.paged_decode import decode_scratch_numel
from tests.core.test_memory import GIB, fleet, ledger_of
from tests.core.test_plan import SPEC

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_limits(seed: int) -> Limits:
    draw = random.Random(seed)
    return Limits(
        dtype=draw.choice(list(DTYPES)),
        block_size=draw.choice([1, 4, 16, 24]),
        max_num_batched_tokens=draw.randrange(1, 3000),
        max_num_seqs=draw.randrange(1, 300),
        max_model_len=draw.choice([1, 200, 256, 257, 5000, 20_000]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_buffers_are_as_large_as_the_tensors_that_are_made(seed: int) -> None:
    limits, groups = random_limits(seed), random.Random(seed).randrange(9)
    spec, lanes = SPEC, limits.max_num_decodes * groups
    wire = WireFormat(spec.queries_per_group, spec.head_dim, DTYPES[limits.dtype])
    pages = torch.empty(1, 2, 1, limits.block_size, spec.head_dim, dtype=DTYPES[limits.dtype]).nbytes
    pages *= pages_per_haul(spec, limits.block_size, limits.dtype)
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
        num_rows=limits.max_num_seqs * spec.num_head_groups,
        max_model_len=limits.max_model_len,
        dtype=DTYPES[limits.dtype],
        device=torch.device("cpu"),
    )
    assert table_bytes(spec, limits) == pool.table_host_BW.nbytes


def test_the_sampler_s_weights_are_counted_as_it_makes_them() -> None:
    assert footprint.WEIGHTS_AT_ONCE == WEIGHTS_AT_ONCE


def gpus(plan: Plan, **changes: Any) -> list[DeviceInfo]:
    """A GPU for each rank, all on one host and all cuda:0."""
    fields = {"device": "cuda:0", "nccl": "2.28.9"} | changes
    return [msgspec.structs.replace(info, gpu=f"gpu {info.rank}", **fields) for info in fleet(plan, 8 * GIB)]


def libraries(plan: Plan, infos: list[DeviceInfo]) -> list[int]:
    """Bytes by rank that a CPU in the same place would not need, but for decode attention."""
    limits = Limits(dtype="bfloat16", block_size=16, max_num_batched_tokens=64, max_num_seqs=4, max_model_len=512)
    by_rank = {info.rank: info for info in infos}
    # on hosts of their own CPUs do not share memory either
    apart = {info.rank: msgspec.structs.replace(info, device="cpu", gpu="", host=str(info.rank)) for info in infos}
    found = []
    for member in plan.members():
        scratch = scratch_bytes(SPEC, getattr(member, "num_groups", 4), limits)
        scratch *= 1 if hasattr(member, "num_groups") else len(plan.stages)
        gpu, cpu = (buffer_bytes(SPEC, plan, each, member, limits) for each in (by_rank, apart))
        found.append(gpu - cpu - scratch)
    return found


def test_a_worker_has_a_page_table_and_messages_for_every_stage() -> None:
    first, last = split_evenly("2+0", SPEC, "cpu").stages[0], split_evenly("1+0", SPEC, "cpu").stages[0]
    [alone] = (msgspec.structs.replace(primary, rank=2) for primary in last.primaries)
    stages = (Stage(layers=(0, 3), primaries=first.primaries), Stage(layers=(3, 7), primaries=(alone,)))
    worker = AttentionWorker(rank=3, device="cpu")
    plan = Plan(stages=stages, workers=(worker,))
    limits = random_limits(0)
    apart = {info.rank: msgspec.structs.replace(info, host=str(info.rank)) for info in fleet(plan)}
    homes = [*first.primaries, alone]
    messages = 2 * sum(sum(message_bytes(SPEC, home.num_groups, limits)) for home in homes)
    assert buffer_bytes(SPEC, plan, apart, worker, limits) == messages + 2 * table_bytes(SPEC, limits)


def test_communicators_of_links_stages_and_handovers_are_counted() -> None:
    first = split_evenly("2+0", SPEC, "cuda:0").stages[0]
    last = split_evenly("2+0", SPEC, "cuda:0").stages[0].primaries
    last = tuple(msgspec.structs.replace(primary, rank=primary.rank + 2) for primary in last)
    stages = (Stage(layers=(0, 3), primaries=first.primaries), Stage(layers=(3, 7), primaries=last))
    plan = Plan(stages=stages, workers=(AttentionWorker(rank=4, device="cuda:0"),))
    of_primary = LIBRARY_BYTES + CUBLAS_BYTES
    link = 2 * COMMUNICATOR_BYTES
    one_version = gpus(plan)
    assert libraries(plan, one_version) == [
        *[of_primary + 2 * link + COMMUNICATOR_BYTES] * 4,  # to the worker, to the other stage, and the own stage
        LIBRARY_BYTES + 4 * link,
    ]
    other = [msgspec.structs.replace(info, nccl="2.29.3") if info.rank == 4 else info for info in one_version]
    assert libraries(plan, other) == [*[of_primary + link + COMMUNICATOR_BYTES] * 4, LIBRARY_BYTES]
    on_one = [msgspec.structs.replace(info, gpu="the one") for info in one_version]
    assert libraries(plan, on_one) == [*[of_primary] * 4, LIBRARY_BYTES], "over CPU memory"


def test_ranks_share_the_memory_of_a_gpu_whatever_they_call_it() -> None:
    plan = split_evenly("1+1", SPEC, "cuda:0")
    apart = gpus(plan)
    one = [msgspec.structs.replace(info, gpu="one", device=f"cuda:{info.rank}") for info in apart]
    options = {"max_num_seqs": 10**5, "max_num_batched_tokens": 8}
    pages = [ledger_of(plan, infos, **options).num_pages[0] for infos in (apart, one)]
    assert 0 < pages[1] < 0.6 * pages[0]


def test_memory_between_two_cpus_of_a_host_is_counted_once() -> None:
    plan = split_evenly("1+1", SPEC, "cpu")
    together = ledger_of(plan, fleet(plan))
    apart = ledger_of(plan, [msgspec.structs.replace(info, host=str(info.rank)) for info in fleet(plan)])
    assert together.rows[0].buffers == apart.rows[0].buffers
    assert together.rows[1].buffers < apart.rows[1].buffers == apart.rows[0].buffers


def test_a_gpu_that_libraries_fill_is_refused() -> None:
    plan = split_evenly("1+0", SPEC, "cuda:0")
    small = [msgspec.structs.replace(info, free_memory=256 << 20) for info in gpus(plan)]
    with pytest.raises(ValueError, match="rank 0 on cuda:0"):
        ledger_of(plan, small)
