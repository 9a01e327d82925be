"""CUDA streams of single threads, and events in them that other streams or the host wait for.

On a CPU, where work is done when a call returns, all of these are no-ops.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Context with a new stream, current for the thread that enters it; may be entered repeatedly."""
    if device.type != "cuda":
        return nullcontext()
    with torch.cuda.device(device):
        return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call,no-any-return]


class _IdleStreams(threading.local):
    """Idle streams of one thread."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, AbstractContextManager[Any]] = {}


_idle = _IdleStreams()


def idle_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Context with a stream of this thread that has no work of its own, for what must not wait for the thread's work.

    Links of a thread share it: torch cycles through 32 streams, so that a stream per link might have other work.
    """
    if device not in _idle.by_device:
        _idle.by_device[device] = own_stream(device)
    return _idle.by_device[device]


class StreamEvent:
    """Event in a stream of `device`. Waiting for one that was never recorded returns at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def record(self) -> None:
        """Records the event after all work that is now queued on the current stream."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Makes the current stream wait for the event; the host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        """Makes the host wait for the event."""
        if self._event is not None:
            self._event.synchronize()
