"""Reports of a rank about itself: its device when it joins, and its counters."""

from collections.abc import Sequence

import msgspec


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's device and place. Sent once, in `Hello`."""

    rank: int
    device: str  # "cpu", "cuda:0"
    name: str  # "AMD EPYC", "NVIDIA H100"
    host: str  # equal iff two ranks share memory and see each other's pids (`comm/hosts.py`)
    address: str  # at which other hosts reach this rank
    pid: int
    num_threads: int
    cores: tuple[int, ...] = ()  # numbers of the host's cores in the rank's affinity mask
    usable_cores: float = 0.0  # as many of these, or CPU seconds per second that control groups allow
    total_memory: int  # bytes
    free_memory: int  # bytes
    driver: str = ""  # versions of the GPU driver and of libraries that its speed depends on
    backend: str = ""  # of attention: "triton" (and "flash-attn 2.8.3"), "cpu", "reference"
    gpu: str = ""  # UUID; "" on a CPU. "cuda:0" of one rank may be another rank's "cuda:1", or another GPU
    capability: tuple[int, int] = (0, 0)  # compute capability of the GPU
    nccl: str = ""  # version; ranks with different ones cannot communicate over NCCL

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def place(self) -> tuple[str, str]:
        """Ranks with the same place share one device: its memory, and its time."""
        return ("gpu", self.gpu) if self.gpu else (self.host, self.device)


def joined_by_nccl(members: Sequence[DeviceInfo]) -> bool:
    """Whether NCCL can join these ranks: each has a GPU, none shares it (NCCL refuses that), and versions are equal."""
    if not all(member.is_gpu and member.nccl for member in members):
        return False
    return len({member.place for member in members}) == len(members) and len({member.nccl for member in members}) == 1


class RankStats(msgspec.Struct, kw_only=True):
    """Counters of one rank since start; what `LLM.fleet_stats()` shows is made of these."""

    rank: int
    attention_seconds: float = 0.0
    bytes_sent: dict[str, int] = {}  # per link, keyed "primary->worker"
    bytes_received: dict[str, int] = {}
