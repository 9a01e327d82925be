"""Proof that ranks share a host: each puts a random token into memory that only processes of its host can open.

Boot id and pid namespace (`supervision.host_id`) are also equal on virtual machines that were restored from one
snapshot. Ranks there would wait on memory that they do not share, and kill processes of their own host by foreign pids.
"""

import secrets
from collections.abc import Iterator

import msgspec
import torch

from hetis.comm.rendezvous import Rendezvous
from hetis.comm.shared_memory import PAGE_BYTES, Address, Segment
from hetis.processes import supervision

_TOKEN_BYTES = 16


class Claim(msgspec.Struct, frozen=True):
    """Published by a rank: the host that it believes to be on, its token, and the memory that holds the token."""

    host: str
    token: bytes
    memory: Address


class Token:
    """Token of this rank in shared memory, which exists until `close`; close it after all ranks have joined."""

    def __init__(self, rank: int, rendezvous: Rendezvous) -> None:
        self._rank, self._rendezvous = rank, rendezvous
        self._memory = Segment.create(PAGE_BYTES)
        self._claim = Claim(supervision.host_id(), secrets.token_bytes(_TOKEN_BYTES), self._memory.address)
        self._memory.memory_B[:_TOKEN_BYTES] = torch.frombuffer(bytearray(self._claim.token), dtype=torch.uint8)
        rendezvous.set(f"host/{rank}", msgspec.msgpack.encode(self._claim))

    def host(self, timeout: float | None = None) -> str:
        """Name that ranks have in common iff they share memory. TimeoutError if a rank does not publish its claim.

        It is `supervision.host_id()`, unless lower ranks claim that host and share no memory with this one.
        """
        others = list(self._claims_to_same_host(timeout))
        if not others:
            return self._claim.host
        first = next((claim for claim in others if is_visible(claim)), self._claim)
        return self._claim.host if first is others[0] else f"{self._claim.host}:{first.token.hex()}"

    def _claims_to_same_host(self, timeout: float | None) -> Iterator[Claim]:
        """Claims of lower ranks to this rank's host, in rank order."""
        for rank in range(self._rank):
            claim = msgspec.msgpack.decode(self._rendezvous.get(f"host/{rank}", timeout), type=Claim)
            if claim.host == self._claim.host:
                yield claim

    def close(self) -> None:
        self._memory.close()


def is_visible(claim: Claim) -> bool:
    """Whether the claimed memory holds the claimed token here, so that this process shares memory with the rank."""
    try:
        memory = Segment.attach(claim.memory)
    except (OSError, ValueError):  # no such process or descriptor on this host, or an unrelated one
        return False
    found = memory.memory_B[:_TOKEN_BYTES].numpy().tobytes()
    memory.close()
    return found == claim.token
