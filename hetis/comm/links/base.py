"""The data path between one primary and one attention worker."""

from abc import ABC, abstractmethod

from torch import Tensor

NUM_SLOTS = 2  # per direction: one message is read while the next one is written
ALIGNMENT = 64  # bytes, of every buffer handed out: a cache line, the widest vector register


class Link(ABC):
    """One end of an ordered two-way path of byte messages.

    Sizes are not sent to be learnt: both ends plan the same step and know them. Each direction has two slots of a
    largest size fixed when the link is opened, so a sender may be one message ahead of the receiver. Messages are
    written and read in place:

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
        """Where to write the next message: uint8 [num_bytes], contiguous, 64-byte aligned, on this end's device.

        Waits while both slots are full. Contents are undefined.
        """

    @abstractmethod
    def send(self) -> None:
        """Publishes the message written there; may return before the peer has it."""

    @abstractmethod
    def recv(self, num_bytes: int) -> Tensor:
        """Waits for the next message, which has exactly `num_bytes`: uint8 [num_bytes], valid until `release`."""

    @abstractmethod
    def release(self) -> None:
        """Gives the received buffer back."""

    @abstractmethod
    def close(self) -> None:
        """Ends this end; what has been sent still arrives. May be called twice."""


def check_size(num_bytes: int, max_bytes: int) -> None:
    """Both ends sized the link from the same plan, so a larger message is our mistake."""
    assert 0 <= num_bytes <= max_bytes, f"a message of {num_bytes} bytes on a link opened for {max_bytes}"


def check_agreement(num_bytes: int, sent_bytes: int) -> None:
    """Both ends plan the same step."""
    assert num_bytes == sent_bytes, f"expected a message of {num_bytes} bytes, the peer sent {sent_bytes}"
