"""Parts of a rank, built from `Setup`: element type, pools, scratch memory, links, description of its device."""

import os
import platform
from typing import Any

import torch

from hetis.comm.links import choose_link, open_link
from hetis.comm.links.base import Link
from hetis.comm.rendezvous import Rendezvous
from hetis.core.device_info import DeviceInfo
from hetis.core.messages import Setup
from hetis.core.placement import PoolId
from hetis.core.plan import Primary
from hetis.processes.limits import usable_cores, usable_memory
from hetis.ranks.gpus import nccl_version, use_interface_of, uuid_of
from hetis.ranks.pool import PagePool
from hetis.ranks.wire import WireFormat
from hetis_kernels.dispatch import cpu_op
from hetis_kernels.flash_prefill import load_flash
from hetis_kernels.paged_decode import decode_scratch_numel

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def wire_format(setup: Setup) -> WireFormat:
    spec = setup.spec
    return WireFormat(spec.queries_per_group, spec.head_dim, TORCH_DTYPES[setup.dtype])


def make_pool(setup: Setup, rank: int, stage: int, device: torch.device) -> PagePool:
    """The pages of `rank` for the layers of `stage`."""
    return PagePool(
        PoolId(rank, stage),
        num_layers=setup.plan.stages[stage].num_layers,
        num_pages=setup.num_pages[rank],
        page_size=setup.block_size,
        head_dim=setup.spec.head_dim,
        num_lanes=setup.max_num_seqs * setup.spec.num_head_groups,
        max_model_len=setup.max_model_len,
        dtype=TORCH_DTYPES[setup.dtype],
        device=device,
    )


def decode_scratch(setup: Setup, num_groups: int, device: torch.device) -> torch.Tensor | None:
    """Memory for `paged_decode` of the lanes of `num_groups` head groups, of all sequences at the longest context.

    Each stream needs its own. None on a CPU, whose kernel needs no such memory.
    """
    if device.type != "cuda":
        return None
    spec, num_seqs = setup.spec, min(setup.max_num_seqs, setup.max_num_batched_tokens)
    numel = decode_scratch_numel(num_seqs * num_groups, spec.queries_per_group, spec.head_dim, setup.max_model_len)
    return torch.empty(numel, dtype=torch.float32, device=device)


def message_limits(setup: Setup, primary: Primary) -> tuple[int, int]:
    """Largest messages in bytes (to a worker, to the primary) on a link of `primary`: tokens, or pages of one layer."""
    wire, groups = wire_format(setup), primary.num_groups
    lanes = min(setup.max_num_seqs, setup.max_num_batched_tokens) * groups
    pages = setup.max_transfer_pages * setup.block_size * setup.spec.kv_bytes_per_token(1, setup.dtype)
    request = wire.request_bytes(lanes, setup.max_num_batched_tokens * groups)
    return max(request, pages), max(wire.reply_bytes(lanes), pages)


def open_links(setup: Setup, rank: int, device: torch.device, rendezvous: Rendezvous) -> dict[int, Link]:
    """This rank's links by peer rank, opened in one global order, lest ranks wait for each other in a cycle."""
    fleet = {info.rank: info for info in setup.fleet}
    if device.type == "cuda":
        use_interface_of(fleet[rank].address)
    links: dict[int, Link] = {}
    for primary, worker in setup.plan.links:
        if rank not in (primary.rank, worker.rank):
            continue
        is_primary = rank == primary.rank
        request, reply = message_limits(setup, primary)
        links[worker.rank if is_primary else primary.rank] = open_link(
            choose_link(fleet[primary.rank], fleet[worker.rank]),
            rendezvous,
            primary=fleet[primary.rank],
            worker=fleet[worker.rank],
            is_primary=is_primary,
            device=device,
            max_send_bytes=request if is_primary else reply,
            max_recv_bytes=reply if is_primary else request,
            timeout=setup.step_timeout,
        )
    return links


def describe_device(rank: int, device: torch.device, address: str, host: str) -> DeviceInfo:
    """This rank's device and place, for `Hello`."""
    gpu: dict[str, Any] = {}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name, backend = torch.cuda.get_device_name(device), "triton"
        if (flash := load_flash()) is not None:
            backend += f", flash-attn {flash[1]}"
        capability = torch.cuda.get_device_capability(device)
        gpu = {"gpu": uuid_of(device), "capability": capability, "nccl": nccl_version()}
        driver = f"torch {torch.__version__}, {_cuda_driver()}"
    else:
        memory = usable_memory()
        free, total, name = memory.available, memory.total, _cpu_name()
        driver = f"torch {torch.__version__}"
        backend = "reference" if cpu_op("paged_decode") is None else "cpu"
    return DeviceInfo(
        rank=rank,
        device=str(device),
        name=name,
        host=host,
        address=address,
        pid=os.getpid(),
        num_threads=torch.get_num_threads(),
        cores=tuple(sorted(os.sched_getaffinity(0))),
        usable_cores=usable_cores(),
        total_memory=total,
        free_memory=free,
        driver=driver,
        backend=backend,
        **gpu,
    )


def share_of_cores(ranks_on_host: int) -> int:
    """Number of threads for one rank's operators: its share of the cores that this process may use."""
    return max(1, int(usable_cores() / max(1, ranks_on_host)))


def _cuda_driver() -> str:
    """Versions of the GPU driver and of CUDA."""
    try:
        with open("/proc/driver/nvidia/version") as lines:
            kernel = next((word for word in lines.readline().split() if word[0].isdigit()), "unknown")
    except OSError:
        kernel = "unknown"
    return f"driver {kernel}, CUDA {torch.version.cuda}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"
