"""What each rank reports about itself when it joins."""

import msgspec


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's device and place. Sent once, in `Hello`."""

    rank: int
    device: str  # "cpu", "cuda:0"
    name: str  # "AMD EPYC", "NVIDIA H100"
    host: str  # boot id + pid namespace: equal iff two ranks can share memory
    address: str  # at which other hosts reach this rank
    pid: int
    num_threads: int
    total_memory: int  # bytes
    free_memory: int  # bytes
    driver: str = ""  # versions of driver and libraries that its speed depends on
    backend: str = ""  # of attention: "triton", "cpu", "reference"


class RankStats(msgspec.Struct, kw_only=True):
    """Counters of one rank since start; what `LLM.fleet_stats()` shows is made of these."""

    rank: int
    attention_seconds: float = 0.0
    bytes_sent: dict[str, int] = {}  # per link, keyed "primary->worker"
    bytes_received: dict[str, int] = {}
