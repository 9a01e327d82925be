"""CUDA streams: work of one thread on a stream of its own, and points in it that other streams or the host wait for.

On a CPU work is done when a call returns: there all of this does nothing.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A new stream, current for the thread that enters the context; may be entered again and again."""
    if device.type != "cuda":
        return nullcontext()
    with torch.cuda.device(device):
        return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call,no-any-return]


class _IdleStreams(threading.local):
    """Of one thread."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, AbstractContextManager[Any]] = {}


_idle = _IdleStreams()


def idle_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A stream of this thread that gets no work, for what must not wait for the thread's work.

    Not one for each link: torch hands out the same 32 streams again and again, so many links would meet others' work.
    """
    if device not in _idle.by_device:
        _idle.by_device[device] = own_stream(device)
    return _idle.by_device[device]


class StreamEvent:
    """A point in a stream of `device`. Waiting for one that was never recorded returns at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def record(self) -> None:
        """After all that the current stream has to do so far."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """The current stream goes on after that point; the host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        """The host waits until the device has reached that point."""
        if self._event is not None:
            self._event.synchronize()
