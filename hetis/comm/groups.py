"""Communication groups of one primary: its stage, and the ranks of neighbouring stages that it exchanges with.

Attention workers belong to no group, so that they can join and leave. No global default group is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from hetis.comm.collectives import GroupTensorParallel, Pipeline, SingleRank, StagedTensorParallel, TensorParallel
from hetis.comm.links import choose_link, open_link
from hetis.comm.links.base import Link
from hetis.comm.process_groups import lost_peer, make_process_group
from hetis.comm.rendezvous import Rendezvous
from hetis.comm.shared_reduce import open_shared
from hetis.core.device_info import DeviceInfo, joined_by_nccl
from hetis.core.plan import Plan


@dataclass(frozen=True, slots=True)
class Groups:
    tensor_parallel: TensorParallel
    pipeline: Pipeline

    def close(self) -> None:
        self.tensor_parallel.close()
        self.pipeline.close()


def init_groups(
    plan: Plan,
    fleet: Sequence[DeviceInfo],
    rank: int,
    rendezvous: Rendezvous,
    device: torch.device,
    *,
    max_tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    timeout: timedelta,
) -> Groups:
    """Joins the groups of primary `rank`; every primary of the plan must call it. `fleet`: every rank's device.

    `max_tokens` of a step, `hidden_size` and `dtype` size the messages between stages. `timeout`: for the other ranks
    to join, and for single operations of gloo and NCCL. TimeoutError or ConnectionError, naming the missing rank.
    """
    infos = {info.rank: info for info in fleet}
    stage, index = plan.position_of(rank)
    members = [infos[rank] for rank in plan.stages[stage].ranks]
    tensor_parallel = _join_stage(f"stage/{stage}", members, index, rendezvous, device, timeout)

    def open_between(sender: int, receiver: int) -> Link:
        num_bytes = max_tokens * hidden_size * dtype.itemsize
        is_sender = rank == sender
        return open_link(
            choose_link(infos[sender], infos[receiver]),
            rendezvous,
            primary=infos[sender],
            worker=infos[receiver],
            is_primary=is_sender,
            device=device,
            max_send_bytes=num_bytes if is_sender else 0,
            max_recv_bytes=0 if is_sender else num_bytes,
            timeout=timeout.total_seconds(),
        )

    previous, following = None, []
    for sender, receiver in plan.handovers:  # one global order, so that no two ranks wait for each other
        if rank == receiver:
            previous = open_between(sender, receiver)
        elif rank == sender:
            following.append(open_between(sender, receiver))
    return Groups(tensor_parallel, Pipeline(previous, following, hidden_size, dtype, device))


def _join_stage(
    name: str,
    members: Sequence[DeviceInfo],
    index: int,
    rendezvous: Rendezvous,
    device: torch.device,
    timeout: timedelta,
) -> TensorParallel:
    """Group over NCCL if it can join all members; else over CPU memory, shared if all are on one host."""
    if len(members) == 1:
        return SingleRank()
    ranks = [member.rank for member in members]
    over_nccl = joined_by_nccl(members)
    if not over_nccl and len({member.host for member in members}) == 1:
        shared = open_shared(rendezvous, name, ranks, index, timeout.total_seconds())
        return StagedTensorParallel(shared, device) if device.type == "cuda" else shared
    transport = device if over_nccl else torch.device("cpu")
    with lost_peer(f"ranks {ranks}"):
        group = make_process_group(rendezvous, name, index, len(members), transport, timeout, members[index].address)
    joined = GroupTensorParallel(group, ranks)
    joined.connect(transport)
    return StagedTensorParallel(joined, device) if transport != device else joined
