"""CUDA end of a link whose transport works on CPU memory.

Messages are written and read on the device. They are copied from and to page-locked memory, the buffers of the inner
link, so that a message crosses the bus once and is not copied again on the host.

    send      copy device -> host on the current stream, wait for it on the host, publish
    recv      wait for the message, copy host -> device on the current stream; the host buffer is released with the
              next message of either direction, when that copy has long ended
"""

import logging
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from hetis.comm.links.base import NUM_BUFFERS, Link, check_size
from hetis.comm.streams import StreamEvent

_log = logging.getLogger(__name__)


class StagedLink(Link):
    """Device buffers in front of a CPU link."""

    def __init__(
        self,
        inner: Link,
        device: torch.device,
        max_send_bytes: int,
        max_recv_bytes: int,
        page_lock: "PageLock | None" = None,
    ) -> None:
        """Takes ownership of `inner` and of `page_lock` on its memory. A CPU `device` works too, with plain copies."""
        self.kind = inner.kind
        self._inner, self._page_lock = inner, page_lock
        self._limits = (max_send_bytes, max_recv_bytes)
        self._out = [torch.empty(max_send_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]
        self._in = [torch.empty(max_recv_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]
        self._copied_out, self._copied_in = StreamEvent(device), StreamEvent(device)
        self._num_sent, self._num_received, self._pending_bytes = 0, 0, 0
        self._holds_inner = False  # whether the last message is being copied from a buffer of the inner link

    def send_buffer(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._limits[0])
        self._pending_bytes = num_bytes
        return self._out[self._num_sent % NUM_BUFFERS][:num_bytes]

    def send(self) -> None:
        self._release_inner()  # before waiting for the peer, which may be waiting for this buffer
        device_B = self._out[self._num_sent % NUM_BUFFERS][: self._pending_bytes]
        self._inner.send_buffer(self._pending_bytes).copy_(device_B, non_blocking=True)
        self._copied_out.record()
        self._copied_out.synchronize()
        self._inner.send()
        self._num_sent += 1
        self.bytes_sent += self._pending_bytes

    def recv(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._limits[1])
        self._release_inner()
        host_B = self._inner.recv(num_bytes)
        device_B = self._in[self._num_received % NUM_BUFFERS][:num_bytes]
        device_B.copy_(host_B, non_blocking=True)
        self._copied_in.record()
        self._holds_inner = True
        self.bytes_received += num_bytes
        return device_B

    def release(self) -> None:
        """Advances to the next device buffer; this one is reused two messages later, after the reader's queued work."""
        self._num_received += 1

    def close(self) -> None:
        self._release_inner()
        if self._page_lock is not None:
            self._page_lock.close()
        self._inner.close()

    def _release_inner(self) -> None:
        if self._holds_inner:
            self._copied_in.synchronize()
            self._holds_inner = False
            self._inner.release()


class PageLock:
    """Page lock on CPU memory for fast copies. Where CUDA refuses it, copies are slower, which is logged."""

    def __init__(self, memory_B: Tensor, device: torch.device) -> None:
        self._memory_B = memory_B
        error = int(_runtime().cudaHostRegister(memory_B.data_ptr(), memory_B.numel(), 0))
        self._is_locked = error == 0
        if error != 0:
            _log.warning("CUDA does not page-lock %d bytes (error %d): copies are slower.", memory_B.numel(), error)
            _clear_last_error(device)

    def close(self) -> None:
        if self._is_locked:
            _runtime().cudaHostUnregister(self._memory_B.data_ptr())
            self._is_locked = False


def _clear_last_error(device: torch.device) -> None:
    """Runs a kernel that consumes the last error of CUDA, which torch would else report after an unrelated kernel."""
    with suppress(RuntimeError):
        torch.empty(1, device=device).fill_(0.0)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
