"""Interface of links, the data path between two ranks: a primary and an attention worker, or two primaries."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from hetis.comm.rendezvous import Rendezvous

NUM_BUFFERS = 2  # per direction: one message is read while the next one is written
ALIGNMENT = 64  # bytes, of every buffer handed out: a cache line, the widest vector register


class Link(ABC):
    """One end of an ordered two-way path of byte messages.

    Sizes are not transmitted: both ends plan the same step and know them. Each direction has two buffers of a size
    fixed when the link is opened, so a sender may be one message ahead of the receiver. Messages are written and read
    in place:

        buffer = link.send_buffer(n)      view = link.recv(n)
        ... write into buffer ...         ... read view ...
        link.send()                       link.release()

    A call that would wait for a peer that has closed its end or died raises `ConnectionError`, naming the peer;
    messages that it sent before can still be received. One thread at a time may use an end.
    """

    kind: str
    bytes_sent: int = 0
    bytes_received: int = 0

    @abstractmethod
    def send_buffer(self, num_bytes: int) -> Tensor:
        """Buffer for the next message: uint8 [num_bytes], contiguous, 64-byte aligned, on this end's device.

        Waits while both buffers are full. Contents are undefined.
        """

    @abstractmethod
    def send(self) -> None:
        """Publishes the message in the last `send_buffer`; may return before the peer has it."""

    @abstractmethod
    def recv(self, num_bytes: int) -> Tensor:
        """Waits for the next message, which has exactly `num_bytes`: uint8 [num_bytes], valid until `release`."""

    @abstractmethod
    def release(self) -> None:
        """Returns the received buffer to the link."""

    @abstractmethod
    def close(self) -> None:
        """Closes this end; messages already sent still arrive. May be called twice."""


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """Arguments that every kind of link needs to open one end."""

    rendezvous: Rendezvous
    ranks: tuple[int, int]  # (primary, worker)
    is_primary: bool
    limits: tuple[int, int]  # bytes of the largest message to the worker and to the primary
    timeout: float  # seconds for the other end to open

    @property
    def key(self) -> str:
        """Prefix of the link's keys at the rendezvous."""
        return f"link/{self.ranks[0]}-{self.ranks[1]}"

    @property
    def peer_rank(self) -> int:
        return self.ranks[1] if self.is_primary else self.ranks[0]

    @property
    def max_send_bytes(self) -> int:
        return self.limits[0] if self.is_primary else self.limits[1]

    @property
    def max_recv_bytes(self) -> int:
        return self.limits[1] if self.is_primary else self.limits[0]


def check_size(num_bytes: int, max_bytes: int) -> None:
    """Asserts that a message fits: both ends sized the link from the same plan."""
    assert 0 <= num_bytes <= max_bytes, f"a message of {num_bytes} bytes on a link opened for {max_bytes}"


def check_agreement(num_bytes: int, sent_bytes: int) -> None:
    """Asserts that both ends planned the same size."""
    assert num_bytes == sent_bytes, f"expected a message of {num_bytes} bytes, the peer sent {sent_bytes}"
