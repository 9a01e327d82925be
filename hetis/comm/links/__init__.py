"""Links: choice of the kind that joins two ranks, and opening of either end."""

import torch

from hetis.comm.links.base import Link, LinkEnd
from hetis.comm.links.local import open_local
from hetis.comm.links.shm import open_shm
from hetis.comm.links.staged import PageLock, StagedLink
from hetis.comm.links.tcp import open_tcp
from hetis.comm.links.torchdist import open_torchdist
from hetis.comm.rendezvous import Rendezvous
from hetis.core.device_info import DeviceInfo, joined_by_nccl

KINDS = ("local", "shm", "torchdist", "tcp")


def choose_link(primary: DeviceInfo, worker: DeviceInfo) -> str:
    """Fastest kind of link that joins two ranks.

    Ranks that share a GPU wait for messages on the host: the GPU runs one of two processes at a time, so a kernel that
    waits for the other process would spin through its own time slice.
    """
    same_host = primary.host == worker.host
    if same_host and primary.pid == worker.pid and primary.place == worker.place:
        return "local"
    if joined_by_nccl((primary, worker)):
        return "torchdist"
    return "shm" if same_host else "tcp"


def open_link(
    kind: str,
    rendezvous: Rendezvous,
    *,
    primary: DeviceInfo,
    worker: DeviceInfo,
    is_primary: bool,
    device: torch.device,
    max_send_bytes: int,
    max_recv_bytes: int,
    timeout: float = 60.0,
    spin_us: int | None = None,
) -> Link:
    """Opens this rank's end of the link between `primary` and `worker`; its buffers are on `device`.

    Waits for the other end, so ranks must open their links in one global order. `max_send_bytes` and `max_recv_bytes`
    are the sizes of the largest messages, mirrored at the other end. `timeout`: seconds for the other end to open, and
    for single operations where the transport has such a limit ("torchdist"). `spin_us`: microseconds that "shm" spins
    before it sleeps; None: by cores and ranks. TimeoutError, naming the key, if the other end does not open.
    """
    limits = (max_send_bytes, max_recv_bytes) if is_primary else (max_recv_bytes, max_send_bytes)
    end = LinkEnd(rendezvous, (primary.rank, worker.rank), is_primary, limits, timeout)
    address = primary.address if is_primary else worker.address
    if kind == "local":
        return open_local(end, device)
    if kind == "torchdist":
        return open_torchdist(end, address, device)
    if kind == "shm":
        shm = open_shm(end, spin_us)
        return _staged(shm, end, device, shm.segment.memory_B)
    if kind == "tcp":
        return _staged(open_tcp(end, address, pinned=device.type == "cuda"), end, device)
    raise ValueError(f"link kind {kind!r} is unknown; use one of {', '.join(KINDS)}.")


def _staged(inner: Link, end: LinkEnd, device: torch.device, memory_B: torch.Tensor | None = None) -> Link:
    """Link with its buffers on `device`, over one in CPU memory. `memory_B`: memory of `inner` that is to be locked."""
    if device.type != "cuda":
        return inner
    page_lock = None if memory_B is None else PageLock(memory_B, device)
    return StagedLink(inner, device, end.max_send_bytes, end.max_recv_bytes, page_lock)
