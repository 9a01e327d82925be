"""The process of one rank: `python -m hetis.launch.member DIRECTORY AGENT`, with the variables of torchrun.

Its standard input is a socket to the agent, its parent, which sends `Joining` when the driver listens. An agent that
torchrun started has it from its rank, which has it from torchrun's store, because agents do not import torch.
"""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from hetis.core.config import Joining
from hetis.core.logs import set_up_logging
from hetis.launch import torchrun
from hetis.processes import start

_KEY = "joining"  # in torchrun's store


def main() -> NoReturn:
    directory, agent_pid = Path(sys.argv[1]), int(sys.argv[2])
    start.begin(agent_pid)
    rank = int(os.environ["RANK"])
    set_up_logging(f"rank {rank}")
    from hetis.ranks.rank import run_rank

    agent = socket.socket(fileno=os.dup(0))
    joining, open_store = _meet_by_torchrun(rank, agent) if torchrun.under_torchrun() else _meet(directory, agent)
    run_rank(
        rank,
        int(os.environ["LOCAL_RANK"]),
        int(os.environ["LOCAL_WORLD_SIZE"]),
        torchrun.own_address(),
        msgspec.json.decode(joining, type=Joining),
        open_store,
        agent,
    )
    sys.stdout.flush()
    os._exit(0)  # libraries' exit handlers may wait for peers that have ended


def _meet(directory: Path, agent: socket.socket) -> tuple[bytes, Callable[[], Any]]:
    """(`Joining`, function that opens the store). On one host the store is a file, which needs no port."""
    from torch.distributed import FileStore

    return _receive(agent), lambda: FileStore(str(directory / "store"), -1)


def _meet_by_torchrun(rank: int, agent: socket.socket) -> tuple[bytes, Callable[[], Any]]:
    from hetis.comm.rendezvous import StoreRendezvous

    rendezvous = StoreRendezvous.from_environment()
    if rank == 0:
        joining = _receive(agent)
        rendezvous.set(_KEY, joining)
    else:
        joining = rendezvous.get(_KEY)
        agent.sendall(joining)
    return joining, lambda: rendezvous.store


def _receive(agent: socket.socket) -> bytes:
    """A line from the agent; ends this process if the agent has ended."""
    with agent.makefile("rb") as lines:
        line = lines.readline()
    return line or sys.exit(1)


if __name__ == "__main__":
    main()
