"""Streams and events of a device, with torch's own replaced by recorders."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hetis.comm.streams import StreamEvent, idle_stream, own_stream

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


class FakeCuda:
    """The parts of `torch.cuda` that `comm/streams.py` uses."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.num_streams = 0
        self.current = SimpleNamespace(wait_event=lambda event: self.log.append(f"stream waits for {event}"))

    def new_stream(self, device: torch.device) -> str:
        self.num_streams += 1
        return f"stream {self.num_streams} of {device}"

    def stream(self, stream: str) -> Any:
        return nullcontext(stream)

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    def current_stream(self, device: torch.device) -> Any:
        assert device == CUDA
        return self.current

    def new_event(self) -> Any:
        log = self.log

        class Event:
            def record(self, stream: Any) -> None:
                log.append("record")

            def synchronize(self) -> None:
                log.append("host waits")

            def __str__(self) -> str:
                return "event"

        return Event()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch.cuda, "Event", fake.new_event)
    for name in ("stream", "device", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_a_thread_has_one_idle_stream_of_its_own(cuda: FakeCuda) -> None:
    def of_this_thread() -> set[str]:
        found = set()
        for _ in range(100):  # links
            with idle_stream(CUDA) as stream:
                found.add(stream)
        return found

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:  # new threads, without a stream so far
        here, there = one.submit(of_this_thread).result(), other.submit(of_this_thread).result()
    with own_stream(CUDA) as own:
        assert {own}.isdisjoint(here | there)
    assert len(here) == len(there) == 1
    assert here.isdisjoint(there)
    assert cuda.num_streams == 3


def test_events_order_streams_and_the_host(cuda: FakeCuda) -> None:
    event = StreamEvent(CUDA)
    event.record()
    event.wait()
    event.synchronize()
    assert cuda.log == ["record", "stream waits for event", "host waits"]


def test_streams_and_events_are_no_ops_on_a_cpu(cuda: FakeCuda) -> None:
    event = StreamEvent(CPU)
    event.record()
    event.wait()
    event.synchronize()
    for context in (own_stream(CPU), idle_stream(CPU)):
        for _ in range(2):
            with context as stream:
                assert stream is None
    assert not cuda.log
    assert cuda.num_streams == 0
