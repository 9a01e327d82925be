"""Round trips and bandwidth of links between two processes on a core each.

    python bench/bench_links.py [--kinds shm torchdist tcp] [--device cuda] [--json FILE]

"torchdist" is gloo, "tcp" is zmq. `--device cuda`: a primary on a GPU and a worker on the CPU ("shm", "tcp"). A round
trip includes a copy from the sender's memory into the message and a copy out of it at the receiver, both ways.
Bandwidth counts one direction: bytes of all messages of a stream over its time, up to one final acknowledgement.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.distributed import TCPStore

from hetis.comm.links import open_link
from hetis.comm.links.base import Link
from hetis.comm.rendezvous import StoreRendezvous
from hetis.core.device_info import DeviceInfo

KINDS = ("shm", "torchdist", "tcp")
SIZES = tuple(16 * 1024 * 2**i for i in range(10))  # 16 KB to 8 MB
SECONDS_PER_POINT = 0.4
STREAM_BYTES = 64 * 2**20  # zmq queues what it cannot send yet: a longer stream would measure its memory


def open_end(kind: str, rank: int, rendezvous: StoreRendezvous, device: torch.device) -> Link:
    """This rank's end of a link, its buffers on `device`."""
    primary, worker = (
        DeviceInfo(
            rank=r,
            device="cpu",
            name="",
            host="",
            address="127.0.0.1",
            pid=r,
            num_threads=1,
            total_memory=0,
            free_memory=0,
        )
        for r in range(2)
    )
    return open_link(
        kind,
        rendezvous.within(kind),
        primary=primary,
        worker=worker,
        is_primary=rank == 0,
        device=device,
        max_send_bytes=max(SIZES),
        max_recv_bytes=max(SIZES),
        spin_us=100,
    )


def measure(link: Link, rank: int, size: int, device: torch.device) -> tuple[float, float]:
    """(median us of a round trip, GB/s one way) at rank 0."""
    memory = torch.zeros(size, dtype=torch.uint8, device=device)

    def send() -> None:
        link.send_buffer(size).copy_(memory)
        link.send()

    def receive() -> None:
        memory.copy_(link.recv(size))
        link.release()

    def repeat(action: Callable[[], None], times: int) -> list[float]:
        seconds = []
        for _ in range(times):
            begin = perf_counter()
            action()
            seconds.append(perf_counter() - begin)
        return seconds

    def round_trip() -> None:
        first, second = (send, receive) if rank == 0 else (receive, send)
        first()
        second()

    def agree_on_count() -> int:
        """Round trips that fit SECONDS_PER_POINT, estimated by rank 0 from ten warm ones and sent to rank 1."""
        count = int(SECONDS_PER_POINT / median(repeat(round_trip, 20)[10:]))
        wire = torch.tensor([max(20, min(5000, count))])
        if rank == 0:
            link.send_buffer(8).copy_(wire.view(torch.uint8))
            link.send()
        else:
            wire = link.recv(8).cpu().view(torch.int64).clone()
            link.release()
        return int(wire)

    count = agree_on_count()
    round_trip_us = 1e6 * median(repeat(round_trip, count))
    count = min(count, max(20, STREAM_BYTES // size))
    begin = perf_counter()
    repeat(send if rank == 0 else receive, count)
    if rank == 0:
        link.recv(1)
    else:
        link.send_buffer(1)
        link.send()
    gigabytes_per_second = count * size / (perf_counter() - begin) / 1e9
    if rank == 0:
        link.release()
    return round_trip_us, gigabytes_per_second


def run_rank(rank: int, kinds: Sequence[str], primary_device: str) -> None:
    """Measures all kinds and sizes at one end. Rank 0 prints a JSON line per point."""
    device = torch.device(primary_device if rank == 0 else "cpu")
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    rendezvous = StoreRendezvous.from_environment(60.0)
    for kind in kinds:
        link = open_end(kind, rank, rendezvous, device)
        for size in SIZES:
            round_trip_us, gigabytes_per_second = measure(link, rank, size, device)
            row = {"kind": kind, "device": primary_device, "bytes": size, "round_trip_us": round(round_trip_us, 1)}
            if rank == 0:
                print(json.dumps(row | {"gigabytes_per_second": round(gigabytes_per_second, 2)}), flush=True)
        link.close()


def start_ranks(kinds: Sequence[str], primary_device: str) -> list[dict[str, float]]:
    """Runs both ends as processes; returns the rows of rank 0."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "LOCAL_WORLD_SIZE": "2",
    }
    command = [sys.executable, __file__, "--kinds", *kinds, "--device", primary_device]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    printed = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "a rank failed"
    return [json.loads(line) for line in printed[0].splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the primary's end")
    parser.add_argument("--json", type=Path, help="append the rows to this file, one JSON object a line")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(int(os.environ["RANK"]), arguments.kinds, arguments.device)
        return
    rows = start_ranks(arguments.kinds, arguments.device)
    machine = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(f"{'kind':>10} {'KB':>6} {'round trip us':>14} {'one way GB/s':>13}")
    for row in rows:
        print(
            f"{row['kind']:>10} {row['bytes'] // 1024:>6} {row['round_trip_us']:>14.1f} "
            f"{row['gigabytes_per_second']:>13.2f}"
        )
    for row in rows:
        print(json.dumps(row | machine))
    if arguments.json:
        with arguments.json.open("a") as file:
            file.writelines(json.dumps(row | machine) + "\n" for row in rows)


if __name__ == "__main__":
    main()
