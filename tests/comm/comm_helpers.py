"""Helpers of tests: both ends of a link in one process, and ranks in processes of their own."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from hetis.comm.links import open_link
from hetis.comm.links.base import Link
from hetis.comm.links.local import local_pair
from hetis.comm.links.staged import StagedLink
from hetis.comm.rendezvous import LocalRendezvous, Rendezvous
from hetis.core.device_info import DeviceInfo
from hetis.processes.supervision import host_id
from tests.processes.look import DEADLINE

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
NAMELESS = "/memfd:hetis (deleted)"  # shared memory that is freed with the last process that maps it


def shared_memory(pid: int | str = "self") -> list[str]:
    """Names in /proc of the shared memory that a process maps: nameless memory of hetis, or files in /dev/shm.

    The directory /dev/shm itself also has files of unrelated processes.
    """
    gc.collect()
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if "memfd:hetis" in line or "/dev/shm" in line]


def device_info(rank: int, **changes: Any) -> DeviceInfo:
    fields: dict[str, Any] = {
        "device": "cpu",
        "name": "CPU",
        "host": host_id(),
        "address": "127.0.0.1",
        "pid": rank,  # as if every rank were a process, where tests run ranks in threads
        "num_threads": 1,
        "total_memory": 0,
        "free_memory": 0,
    }
    return DeviceInfo(rank=rank, **(fields | changes))


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Runs all functions concurrently, one thread each; returns their results or raises the first exception."""
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results


def open_end(
    kind: str,
    rendezvous: Rendezvous,
    rank: int,
    send_bytes: int,
    recv_bytes: int,
    ranks: tuple[int, int] = (0, 1),
    device: torch.device = CPU,
) -> Link:
    return open_link(
        kind,
        rendezvous,
        primary=device_info(ranks[0]),
        worker=device_info(ranks[1]),
        is_primary=rank == ranks[0],
        device=device,
        max_send_bytes=send_bytes,
        max_recv_bytes=recv_bytes,
        timeout=DEADLINE,
    )


def open_pair(kind: str, to_worker: int, to_primary: int, device: torch.device = CPU) -> tuple[Link, Link]:
    """(primary's end, worker's end), both in this process. `device`: of the primary's end; the worker's is on the CPU.

    Kind "staged": a staged link over a local one at either end.
    """
    if kind == "staged":
        primary, worker = local_pair(to_worker, to_primary)
        return StagedLink(primary, device, to_worker, to_primary), StagedLink(worker, CPU, to_primary, to_worker)
    rendezvous = LocalRendezvous()
    primary_end, worker_end = together(
        lambda: open_end(kind, rendezvous, 0, to_worker, to_primary, device=device),
        lambda: open_end(kind, rendezvous, 1, to_primary, to_worker),
    )
    return primary_end, worker_end


def random_bytes(size: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def transmit(link: Link, message: torch.Tensor) -> None:
    link.send_buffer(message.numel()).copy_(message)
    link.send()


def receive(link: Link, num_bytes: int) -> torch.Tensor:
    message = link.recv(num_bytes).clone().cpu()
    link.release()
    return message


def ping_pong(link: Link, is_primary: bool, max_bytes: int, num_messages: int, seed: int) -> None:
    """Sends random messages of random sizes, which the worker returns in reverse; asserts that they match."""
    sizes = torch.randint(0, max_bytes + 1, (num_messages,), generator=torch.Generator().manual_seed(seed)).tolist()
    for i, size in enumerate([0, 1, 63, 65, max_bytes, *sizes]):
        if is_primary:
            message = random_bytes(size, seed + i)
            transmit(link, message)
            assert torch.equal(receive(link, size), message.flip(0))
        else:
            transmit(link, receive(link, size).flip(0))


class Ranks:
    """Processes that run `rank_script SCENARIO`, with a store that the test hosts as torchrun does."""

    def __init__(self, scenario: str, ranks: Sequence[int], *arguments: str, **environment: str) -> None:
        self.store = TCPStore(
            "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=DEADLINE), wait_for_workers=False
        )
        self.environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "test",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.processes = {
            rank: subprocess.Popen(
                [sys.executable, "-m", "tests.comm.rank_script", scenario, *arguments],
                cwd=ROOT,
                env=os.environ | self.environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in ranks
        }

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()

    def finish(self) -> dict[int, str]:
        """Output of each rank; asserts that all end with code 0."""
        printed = {rank: process.communicate(timeout=DEADLINE)[0] for rank, process in self.processes.items()}
        for rank, process in self.processes.items():
            assert process.returncode == 0, f"rank {rank}:\n{printed[rank]}"
        return printed
