"""One rank of a test: `python -m tests.comm.rank_script SCENARIO`. Prints "ok" at the end."""

import os
import sys
from datetime import timedelta

import torch

from hetis.comm import shared_memory
from hetis.comm.groups import init_groups
from hetis.comm.rendezvous import StoreRendezvous
from hetis.comm.shared_reduce import open_shared
from hetis.core.plan import Plan, Primary, Stage
from tests.comm.comm_helpers import CPU, device_info, open_end, ping_pong, receive, transmit
from tests.processes.look import DEADLINE

MAX_BYTES = 300_000


def links(rank: int, rendezvous: StoreRendezvous) -> None:
    """Ranks 0 and 1 exchange messages over every kind of link between processes."""
    for kind in ("shm", "tcp", "torchdist"):
        link = open_end(kind, rendezvous.within(kind), rank, MAX_BYTES, MAX_BYTES)
        ping_pong(link, rank == 0, MAX_BYTES, 40, seed=7)
        link.close()
    plain = (shared_memory.plain_wait, shared_memory.plain_publish)
    shared_memory.operations = lambda: plain  # type: ignore[assignment]
    link = open_end("shm", rendezvous.within("plain"), rank, MAX_BYTES, MAX_BYTES)
    ping_pong(link, rank == 0, MAX_BYTES, 40, seed=8)
    link.close()


def echo_once(rank: int, rendezvous: StoreRendezvous) -> None:
    """Worker of a test that kills it: answers one message, then waits."""
    link = open_end(sys.argv[2], rendezvous, rank, 64, 64)
    transmit(link, receive(link, 64))
    link.recv(64)


def idle_pair(rank: int, rendezvous: StoreRendezvous) -> None:
    """Ranks 0 and 1 use their link, then wait for messages until the test kills them."""
    link = open_end("shm", rendezvous, rank, 1 << 20, 1 << 20)
    transmit(link, torch.ones(1 << 20, dtype=torch.uint8))
    receive(link, 1 << 20)
    rendezvous.set(f"ready/{rank}", b"")
    link.recv(1)


def stages(rank: int, rendezvous: StoreRendezvous) -> None:
    """Ranks 0 and 1 are the first stage, rank 2 the second; three micro-batches in flight."""
    plan = plan_of_stages([2, 1])
    hidden_size, tokens = 24, [5, 1, 9]
    groups = init_groups(
        plan,
        [device_info(r) for r in range(3)],
        rank,
        rendezvous,
        CPU,
        max_tokens=max(tokens),
        hidden_size=hidden_size,
        dtype=torch.bfloat16,
        timeout=timedelta(seconds=DEADLINE),
    )
    for num_tokens in tokens:
        whole_TH = torch.arange(num_tokens * hidden_size, dtype=torch.bfloat16).view(num_tokens, hidden_size)
        if rank < 2:
            share_TH = whole_TH * (0.25 if rank == 0 else 0.75)
            groups.tensor_parallel.all_reduce(share_TH)
            assert torch.equal(share_TH, whole_TH)
            groups.pipeline.send(share_TH)
        else:
            assert torch.equal(groups.pipeline.recv(num_tokens), whole_TH)
    groups.close()


def leave_stage(rank: int, rendezvous: StoreRendezvous) -> None:
    """Rank 1 joins a stage with rank 0, which is the test; it is killed while the test waits for its part."""
    group = open_shared(rendezvous, "stage", [0, 1], rank, DEADLINE)
    group.all_reduce(torch.ones(3))
    rendezvous.get("never")


def plan_of_stages(sizes: list[int]) -> Plan:
    ranks = iter(range(sum(sizes)))

    def primary() -> Primary:
        return Primary(rank=next(ranks), device="cpu", groups=(0, 1), mlp_columns=(0, 1), vocab_rows=(0, 1))

    return Plan(
        stages=tuple(
            Stage(layers=(s, s + 1), primaries=tuple(primary() for _ in range(size))) for s, size in enumerate(sizes)
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    own_rank = int(os.environ["RANK"])
    globals()[sys.argv[1]](own_rank, StoreRendezvous.from_environment(30.0))
    print("ok", flush=True)
