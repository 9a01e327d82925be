"""What an emulated fleet is, as plain data."""

import msgspec


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


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """One primary and any number of attention workers.

    The primary (and the driver) has the first core to itself; the workers and the client run on the last one, so the
    shares of the workers should not add up to more than 0.7.
    """

    primary: Member
    workers: tuple[Member, ...] = ()

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
