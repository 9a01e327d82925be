"""Which ranks share a host, proven: each shows a random token in memory that only processes of its host can open.

Boot id and pid namespace (`supervision.host_id`) are equal on virtual machines, too, that were restored from one
snapshot. Ranks there would wait in memory that they do not share, and kill processes by pids of another host.
"""

import secrets
from collections.abc import Iterator

import msgspec
import torch

from hetis.comm.rendezvous import Rendezvous
from hetis.comm.shared_memory import PAGE_BYTES, Address, Segment
from hetis.processes import supervision

_TOKEN_BYTES = 16


class Note(msgspec.Struct, frozen=True):
    """What a rank shows the others: the host it claims, its token, and where in memory the token lies."""

    host: str
    token: bytes
    memory: Address


class Token:
    """This rank's; shown until `close`, which is when all ranks have joined."""

    def __init__(self, rank: int, rendezvous: Rendezvous) -> None:
        self._rank, self._rendezvous = rank, rendezvous
        self._memory = Segment.create(PAGE_BYTES)
        self._note = Note(supervision.host_id(), secrets.token_bytes(_TOKEN_BYTES), self._memory.address)
        self._memory.memory_B[:_TOKEN_BYTES] = torch.frombuffer(bytearray(self._note.token), dtype=torch.uint8)
        rendezvous.set(f"host/{rank}", msgspec.msgpack.encode(self._note))

    def host(self, timeout: float | None = None) -> str:
        """A name that ranks have in common iff they share memory. TimeoutError if a rank does not show its token.

        It is `supervision.host_id()`, unless ranks before this one have the same without sharing memory.
        """
        others = list(self._alike(timeout))
        if not others:
            return self._note.host
        first = next((note for note in others if is_visible(note)), self._note)
        return self._note.host if first is others[0] else f"{self._note.host}:{first.token.hex()}"

    def _alike(self, timeout: float | None) -> Iterator[Note]:
        """Of ranks before this one, in rank order, that claim the same host."""
        for rank in range(self._rank):
            note = msgspec.msgpack.decode(self._rendezvous.get(f"host/{rank}", timeout), type=Note)
            if note.host == self._note.host:
                yield note

    def close(self) -> None:
        self._memory.close()


def is_visible(note: Note) -> bool:
    """Whether this process finds the token of a note where the note says, and so shares memory with its rank."""
    try:
        memory = Segment.attach(note.memory)
    except (OSError, ValueError):  # no such process or descriptor here, or another one's
        return False
    found = memory.memory_B[:_TOKEN_BYTES].numpy().tobytes()
    memory.close()
    return found == note.token
