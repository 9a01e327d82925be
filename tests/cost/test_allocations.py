"""The memory ledger against real ranks: the bytes that each of them holds once it is built."""

import gc
import os
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hetis.comm.rendezvous import LocalRendezvous
from hetis.comm.shared_memory import Segment
from hetis.core.config import EngineConfig
from hetis.core.messages import Setup
from hetis.core.plan import Primary
from hetis.core.plan_sources import resolve_plan
from hetis.cost.buffers import buffers_of
from hetis.cost.footprint import page_bytes_of, weight_bytes, workspace_bytes
from hetis.cost.limits import Limits
from hetis.cost.memory import RankMemory, plan_memory
from hetis.engine.setup import make_setup
from hetis.models.families import read_model_spec
from hetis.ranks.rank import build_member
from tests.checkpoints import make_checkpoint
from tests.comm.comm_helpers import CPU, device_info, together

PLAN: dict[str, Any] = {
    "stages": [{"layers": 1, "primaries": [{"head_groups": 3}, {"head_groups": 2}]}, {"primaries": [{}]}],
    "attention": [{}, {}],
}
BOUNDS = {"block_size": 4, "max_num_batched_tokens": 200, "max_num_seqs": 40, "max_model_len": 256}
LEAST_BYTES = 8192  # all arrays of a rank with a few values for each slot, which the ledger leaves out
NOT_DATA = (type, ModuleType, FunctionType, BuiltinFunctionType)


def reachable(root: object) -> list[object]:
    """All objects that `root` refers to, directly or not, except code."""
    found: dict[int, object] = {}
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in found or isinstance(item, NOT_DATA):
            continue
        found[id(item)] = item
        if isinstance(item, memoryview):
            stack.append(item.obj)
        elif isinstance(item, np.ndarray):
            stack.append(item.base)
        elif not isinstance(item, torch.Tensor):
            stack += gc.get_referents(item)
    return list(found.values())


def memory_of(root: object) -> dict[tuple[str, int], int]:
    """Bytes of tensors, arrays and shared memory by (kind, address or inode); what several views show counts once."""
    found: dict[tuple[str, int], int] = {}
    objects = reachable(root)
    shared = {each.memory_B.data_ptr(): each for each in objects if isinstance(each, Segment)}
    for each in objects:
        address, size = 0, 0
        if isinstance(each, torch.Tensor):
            address, size = each.untyped_storage().data_ptr(), each.untyped_storage().nbytes()
        elif isinstance(each, np.ndarray) and each.base is None:
            address, size = each.ctypes.data, each.nbytes
        if address in shared:
            found["shared", os.fstat(shared[address].address.descriptor).st_ino] = shared[address].num_bytes
        elif size:
            found["own", address] = size
    return found


def build(directory: Path, *, apart: bool) -> tuple[Setup, list[Any], tuple[RankMemory, ...]]:
    """All ranks as threads of this process, with their ledger. `apart`: each as if on a host of its own."""
    config = EngineConfig(model=str(directory), plan=PLAN, device="cpu", kv_cache_memory=1 << 20, **BOUNDS)
    spec = read_model_spec(directory)
    plan = resolve_plan(PLAN, spec, "cpu", config.kv_cache_memory)
    fleet = [
        device_info(rank, host=f"host {rank}" if apart else "one host", free_memory=1 << 30) for rank in plan.ranks
    ]
    setup, _ = make_setup(config, spec, plan, fleet, [])
    rendezvous = LocalRendezvous()
    members = together(*[partial(build_member, setup, rank, CPU, rendezvous, print) for rank in plan.ranks])
    return setup, members, plan_memory(spec, plan, fleet, dtype=setup.dtype, **BOUNDS).ranks


@pytest.mark.parametrize("apart", [False, True], ids=["one host", "hosts of their own"])
def test_ranks_hold_what_the_ledger_counts(tmp_path: Path, apart: bool) -> None:
    setup, members, ledger = build(make_checkpoint(tmp_path, "five_groups"), apart=apart)
    limits = Limits(dtype=setup.dtype, **BOUNDS)
    spec, plan, infos = setup.spec, setup.plan, {info.rank: info for info in setup.fleet}
    seen: set[tuple[str, int]] = set()  # shared memory counts at its creator, the first that has it
    for member, built, planned in zip(plan.members, members, ledger, strict=True):
        buffers = buffers_of(spec, plan, infos, member, limits)
        expected = setup.num_pages[member.rank] * page_bytes_of(spec, plan, member, setup.block_size, setup.dtype)
        expected += buffers.page_tables + buffers.links
        if isinstance(member, Primary):
            expected += weight_bytes(spec, plan, member, setup.dtype) + workspace_bytes(spec, member, limits)
            expected += 0 if apart else buffers.sums  # what sums need in a group is allocated for each of them
        memory = memory_of(built)
        held = sum(size for key, size in memory.items() if key not in seen)
        seen |= memory.keys()
        assert 0 <= held - expected < LEAST_BYTES, f"rank {member.rank}"
        assert held - LEAST_BYTES < planned.weights + planned.activations + planned.buffers + planned.kv
    for built in members:
        built.close()
