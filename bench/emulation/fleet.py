"""Description of an emulated fleet, as plain data."""

import msgspec

LARGEST_TOGETHER = 0.8  # share of their core for all workers; the client and call overheads need the rest


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """Latency and rate added to the link between the primary and a worker, in each direction."""

    latency_ms: float = 0.0
    megabytes_per_s: float | None = None  # None: not limited

    @property
    def is_plain(self) -> bool:
        return self == Link()


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One rank."""

    kv_tokens: int  # tokens of whole sequences (all head groups) that its KV memory holds
    share: float = 1.0  # of its core's speed, for work bound by memory: see `device.py`
    link: Link = Link()  # to the primary; ignored for the primary itself

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}: a member has more than 0 and at most 1 of a core's speed.")
        if self.kv_tokens < 1:
            raise ValueError(f"kv_tokens is {self.kv_tokens}: a member holds at least 1 token.")


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """One primary and any number of attention workers.

    Primary and driver run on the first core, workers and client on the last one.
    """

    primary: Member
    workers: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        together = sum(worker.share for worker in self.workers)
        if together > LARGEST_TOGETHER:
            raise ValueError(
                f"the workers' shares add up to {together:g}: they run on one core beside the client, so give them "
                f"{LARGEST_TOGETHER} together at most."
            )

    @property
    def members(self) -> tuple[Member, ...]:
        """In rank order."""
        return (self.primary, *self.workers)

    @property
    def plan(self) -> str:
        return f"1+{len(self.workers)}"


class Emulation(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that the ranks of a fleet read at start."""

    fleet: Fleet
    primary_core: int  # also the driver's
    worker_core: int  # also the client's
