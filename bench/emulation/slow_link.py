"""A link with added latency and a limited rate, on top of a real one.

The receiver gets a message at

    due = max(sent, when the line is free) + bytes / rate + latency

and the message occupies the line of its direction for bytes / rate. The sender writes `sent` and `due` behind the
message (both ends are processes of one host with one monotonic clock) and continues; the receiver sleeps until `due`. A
flow-control window is not emulated: as on any link, a sender may be one message ahead of the receiver.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from hetis.comm.links.base import Link

from .fleet import Link as LinkSpeed
from .waiting import sleep_until

STAMP_BYTES = 16  # two int64 of nanoseconds: sent, due
_ALIGNMENT = 8


def padded(num_bytes: int) -> int:
    """Size of a message of `num_bytes` with its stamp, in bytes."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT + STAMP_BYTES


class SlowLink(Link):
    """One end of the link."""

    def __init__(
        self,
        inner: Link,
        speed: LinkSpeed,
        *,
        now_ns: Callable[[], int] = time.monotonic_ns,
        sleep_until: Callable[[float], None] = sleep_until,
    ) -> None:
        self.kind = inner.kind
        self._inner, self._now_ns, self._sleep_until = inner, now_ns, sleep_until
        self._latency_ns = int(speed.latency_ms * 1e6)
        self._ns_per_byte = 0.0 if speed.megabytes_per_s is None else 1e3 / speed.megabytes_per_s
        self._line_free_ns = 0
        self._stamp = torch.empty(0, dtype=torch.int64)  # of the message that is being written
        self._num_bytes = 0
        self.num_awaited = 0  # messages that this end slept for
        self.asked_ns = 0  # requested delay of these messages, in all
        self.late_ns = 0  # excess over it, in all

    def send_buffer(self, num_bytes: int) -> Tensor:
        message = self._inner.send_buffer(padded(num_bytes))
        self._stamp, self._num_bytes = message[-STAMP_BYTES:].view(torch.int64), num_bytes
        return message[:num_bytes]

    def send(self) -> None:
        sent = self._now_ns()
        self._line_free_ns = max(sent, self._line_free_ns) + int(self._num_bytes * self._ns_per_byte)
        self._stamp[0], self._stamp[1] = sent, self._line_free_ns + self._latency_ns
        self._inner.send()
        self.bytes_sent += self._num_bytes

    def recv(self, num_bytes: int) -> Tensor:
        message = self._inner.recv(padded(num_bytes))
        sent, due = message[-STAMP_BYTES:].view(torch.int64).tolist()
        if due > self._now_ns():
            self._sleep_until(due / 1e9)
            self.num_awaited += 1
            self.asked_ns += due - sent
            self.late_ns += self._now_ns() - due
        self.bytes_received += num_bytes
        return message[:num_bytes]

    def release(self) -> None:
        self._inner.release()

    def close(self) -> None:
        self._inner.close()
