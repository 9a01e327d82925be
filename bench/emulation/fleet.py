"""What an emulated fleet is, as plain data."""

import msgspec

LARGEST_TOGETHER = 0.8  # of their core that workers may use; the client and the calls of kernels need the rest


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """Added to the link between the primary and a worker, either way."""

    latency_ms: float = 0.0
    megabytes_per_s: float | None = None  # None: as fast as the link itself

    @property
    def is_plain(self) -> bool:
        return self == Link()


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One rank."""

    kv_tokens: int  # of whole sequences that its KV memory holds
    share: float = 1.0  # of its core's speed, for all that is bound by memory: see `device.py`
    link: Link = Link()  # to the primary; of no meaning for the primary itself

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}: a member has more than 0 and at most 1 of a core's speed.")
        if self.kv_tokens < 1:
            raise ValueError(f"kv_tokens is {self.kv_tokens}: a member holds at least 1 token.")


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """One primary and any number of attention workers.

    The primary (and the driver) has the first core to itself; the workers and the client run on the last one.
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
    """What the ranks of a fleet are told."""

    fleet: Fleet
    primary_core: int  # of the driver, too
    worker_core: int  # of the client, too
