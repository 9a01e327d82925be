"""Links: which kind joins two ranks, and how both open it."""

import torch

from hetis.comm.links.base import Link
from hetis.comm.links.local import open_local
from hetis.comm.links.shm import open_shm
from hetis.comm.links.staged import PageLock, StagedLink
from hetis.comm.links.tcp import open_tcp
from hetis.comm.links.torchdist import open_torchdist
from hetis.comm.rendezvous import Rendezvous
from hetis.core.device_info import DeviceInfo, joined_by_nccl

KINDS = ("local", "shm", "torchdist", "tcp")


def choose_link(primary: DeviceInfo, worker: DeviceInfo) -> str:
    """The fastest kind of link that joins two ranks.

    Ranks that share a GPU wait for messages on the host: the GPU runs one of two processes at a time, so a kernel that
    waits for the other process would spin through its own turn.
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
    are the largest messages either way, mirrored at the other end. `timeout`: seconds for the other end to come, and
    for single operations where the transport knows such a limit ("torchdist"). `spin_us`: how long "shm" waits with the
    core before it sleeps; None: by cores and ranks. TimeoutError naming the key if the other end does not come.
    """
    key = f"link/{primary.rank}-{worker.rank}"
    peer_rank = worker.rank if is_primary else primary.rank
    limits = (max_send_bytes, max_recv_bytes) if is_primary else (max_recv_bytes, max_send_bytes)
    if kind == "local":
        ranks = (primary.rank, worker.rank)
        return open_local(
            rendezvous, key, ranks=ranks, is_primary=is_primary, limits=limits, device=device, timeout=timeout
        )
    address = primary.address if is_primary else worker.address
    if kind == "torchdist":
        return open_torchdist(
            rendezvous,
            key,
            address=address,
            peer_rank=peer_rank,
            is_primary=is_primary,
            limits=limits,
            device=device,
            timeout=timeout,
        )
    staged, page_lock = device.type == "cuda", None
    inner: Link
    if kind == "shm":
        inner = open_shm(
            rendezvous,
            key,
            peer_rank=peer_rank,
            is_primary=is_primary,
            limits=limits,
            timeout=timeout,
            spin_us=spin_us,
        )
        page_lock = PageLock(inner.segment.memory_B, device) if staged else None
    elif kind == "tcp":
        inner = open_tcp(
            rendezvous,
            key,
            address=address,
            peer_rank=peer_rank,
            is_primary=is_primary,
            limits=limits,
            timeout=timeout,
            pinned=staged,
        )
    else:
        raise ValueError(f"unknown link kind {kind!r}: choose one of {', '.join(KINDS)}.")
    return StagedLink(inner, device, max_send_bytes, max_recv_bytes, page_lock) if staged else inner
