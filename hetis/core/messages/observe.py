"""What a front end may ask about a running fleet, and the answers: data of the driver alone, given at once."""

from hetis.core.messages.base import Message


class EngineStatus(Message):
    """The engine in a few numbers; all are zero during start-up."""

    step: int = 0  # steps finished so far: progress
    num_running: int = 0  # sequences
    num_waiting: int = 0
    num_preemptions: int = 0
    kv_usage: float = 0.0  # pages in use / pages, of all ranks, 0..1
    in_flight_seconds: float = 0.0  # age of the oldest step in flight; 0: none
    silent: list[str] = []  # one sentence for each rank that has sent no heartbeat for some seconds


class StatusQuery(Message):
    """Answered with `EngineStatus` at once, by the driver alone, also during start-up."""
