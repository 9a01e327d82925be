"""Operations of NCCL, their order and their streams, recorded by stand-ins, since there is no GPU."""

from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from hetis.comm.collectives import GroupTensorParallel
from hetis.comm.links import local, staged, torchdist
from hetis.comm.links.base import LinkEnd
from hetis.comm.links.local import local_pair
from hetis.comm.links.staged import PageLock, StagedLink
from hetis.comm.links.torchdist import NUM_CTAS, TorchDistLink, open_torchdist
from hetis.comm.process_groups import make_process_group
from hetis.comm.rendezvous import LocalRendezvous
from tests.comm.comm_helpers import CPU, together
from tests.processes.look import DEADLINE

LIMIT = timedelta(seconds=20)


class Recorder:
    """Process group of two that logs its operations and waits."""

    def __init__(self, log: list[str], name: str, rank: int = 0) -> None:
        self._log, self._name, self._rank = log, name, rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        return self._work(f"{self._name}.send {tensors[0].numel()}")

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        return self._work(f"{self._name}.recv {tensors[0].numel()}")

    def _work(self, operation: str) -> Any:
        self._log.append(operation)

        def wait(*limits: timedelta) -> None:
            self._log.append(f"wait for {operation}" + "".join(f" at most {limit.seconds} s" for limit in limits))

        return SimpleNamespace(wait=wait)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Log of the streams and events of links."""
    entries: list[str] = []

    class Event:
        count = 0

        def __init__(self, device: torch.device) -> None:
            self._name = f"event {Event.count}"
            Event.count += 1

        def record(self) -> None:
            entries.append(f"record {self._name}")

        def wait(self) -> None:
            entries.append(f"wait for {self._name}")

        def synchronize(self) -> None:
            entries.append(f"host waits for {self._name}")

    class Stream:
        def __init__(self, device: torch.device) -> None:
            pass

        def __enter__(self) -> None:
            entries.append("on the idle stream")

        def __exit__(self, *error: object) -> None:
            entries.append("back")

    for module in (torchdist, local, staged):
        monkeypatch.setattr(module, "StreamEvent", Event)
    monkeypatch.setattr(torchdist, "idle_stream", Stream)
    return entries


def test_a_receive_does_not_wait_for_the_work_of_the_current_stream(log: list[str]) -> None:
    """The idle stream waits for the buffer's last reader only; the current stream then waits for the message."""
    link = TorchDistLink(Recorder(log, "out"), Recorder(log, "in"), 1, (8, 8), CPU)
    for _ in range(3):
        link.recv(5)
        link.release()
    expected: list[str] = []
    for index in (0, 1, 0):
        expected += ["on the idle stream", f"wait for event {index}", "in.recv 5", "back", "wait for in.recv 5"]
        expected += [f"record event {index}"]
    assert log == expected


@pytest.mark.parametrize("is_primary", [True, False])
def test_links_make_communicators_in_one_order_at_both_ends(log: list[str], is_primary: bool) -> None:
    """The direction to the worker is first: each end waits for the other in the first operation of a group."""
    link = TorchDistLink(Recorder(log, "out"), Recorder(log, "in"), 1, (8, 0), CPU)
    link.connect(is_primary, LIMIT)
    send = ["out.send 1", "wait for out.send 1 at most 20 s"]
    recv = ["in.recv 1", "wait for in.recv 1 at most 20 s"]
    assert log == (send + recv if is_primary else recv + send)


def test_buffers_of_a_local_link_are_ordered_between_streams(log: list[str]) -> None:
    primary, worker = local_pair(8, 8)
    log.clear()
    primary.send_buffer(8)
    primary.send()
    worker.recv(8)
    worker.release()
    primary.send_buffer(8)
    primary.send()
    primary.send_buffer(8)
    written, read = log[1].removeprefix("record "), log[0].removeprefix("wait for ")
    assert log[:4] == [f"wait for {read}", f"record {written}", f"wait for {written}", f"record {read}"]
    assert log[-1] == f"wait for {read}", "before the buffer is written again"


def test_a_staged_message_is_published_when_its_copy_has_ended(log: list[str]) -> None:
    """A host buffer is released to the sender once the copy from it has ended."""

    class Inner(Recorder):
        kind = "inner"

        def send_buffer(self, num_bytes: int) -> torch.Tensor:
            return torch.empty(num_bytes, dtype=torch.uint8)

        def send(self) -> None:  # type: ignore[override]
            self._log.append("publish")

        def recv(self, num_bytes: int) -> torch.Tensor:  # type: ignore[override]
            return torch.zeros(num_bytes, dtype=torch.uint8)

        def release(self) -> None:
            self._log.append("release")

    link = StagedLink(Inner(log, "inner"), CPU, 8, 8)  # type: ignore[arg-type]
    link.send_buffer(5)
    link.send()
    assert log == ["record event 0", "host waits for event 0", "publish"]
    log.clear()
    for _ in range(2):
        link.recv(5)
        link.release()
    assert log == ["record event 1", "host waits for event 1", "release", "record event 1"]


class FakeNccl:
    """Stand-in for `torch.distributed.ProcessGroupNCCL`, which builds of torch for CPUs lack."""

    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.is_high_priority_stream = is_high_priority_stream
            self.config = SimpleNamespace(min_ctas=None, max_ctas=None)
            self._timeout = timedelta(0)

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        self.options, self._rank = options, rank


def test_groups_of_links_have_priority_few_blocks_and_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "ProcessGroupNCCL", FakeNccl, raising=False)
    rendezvous, cuda = LocalRendezvous(), torch.device("cuda", 0)
    make = partial(make_process_group, rendezvous, size=2, device=cuda, timeout=LIMIT)
    link, other = together(*[partial(make, "link", index=i, num_ctas=NUM_CTAS) for i in range(2)])
    assert link._rank == 0
    assert other._rank == 1
    options = link.options
    assert options.is_high_priority_stream
    assert (options.config.min_ctas, options.config.max_ctas, options._timeout) == (NUM_CTAS, NUM_CTAS, LIMIT)
    stage, _ = together(*[partial(make, "stage", index=i) for i in range(2)])
    assert stage.options.is_high_priority_stream
    assert stage.options.config.max_ctas is None


def test_no_group_is_made_before_all_members_have_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL itself would wait without a limit."""
    monkeypatch.setattr(distributed, "ProcessGroupNCCL", None, raising=False)
    with pytest.raises(TimeoutError, match="stage/here/1"):
        make_process_group(LocalRendezvous(), "stage", 0, 2, torch.device("cuda"), timedelta(seconds=0.01))


def test_a_link_is_open_when_bytes_have_gone_both_ways() -> None:
    rendezvous = LocalRendezvous()
    ends = [LinkEnd(rendezvous, (0, 1), is_primary, (8, 0), DEADLINE) for is_primary in (True, False)]
    primary, worker = together(*[partial(open_torchdist, end, "127.0.0.1", CPU) for end in ends])
    assert primary.bytes_sent == primary.bytes_received == worker.bytes_sent == 0, "these are no messages"


def test_a_wrong_sum_is_detected_when_the_stage_connects() -> None:
    class Group(Recorder):
        def _allgather_base(self, out: torch.Tensor, mine: torch.Tensor) -> Any:
            out.zero_()
            return self._work("gather")

    with pytest.raises(AssertionError, match=r"a sum of 2 ones is 0\.0"):
        GroupTensorParallel(Group([], "group"), [0, 1]).connect(CPU)


class OnGpu(torch.Tensor):
    """Tensor that claims to be on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(("size", "operation"), [(2, "allreduce"), (3, "gather")])
def test_nccl_sums_for_two_gpus_and_more_add_in_rank_order(log: list[str], size: int, operation: str) -> None:
    class Group(Recorder):
        def size(self) -> int:
            return size

        def allreduce(self, tensors: list[torch.Tensor]) -> Any:
            return self._work("allreduce")

        def _allgather_base(self, out: torch.Tensor, mine: torch.Tensor) -> Any:
            out.view(torch.bfloat16).copy_(torch.tensor([256.0, 1.0, 1.0]))  # one by one: 256, in float32: 258
            return self._work("gather")

    part = torch.full((1,), 256.0, dtype=torch.bfloat16).as_subclass(OnGpu)
    GroupTensorParallel(Group(log, "group"), range(size)).all_reduce(part)
    assert log == [operation, f"wait for {operation}"]
    assert float(part) == (256 if size == 2 else 258)


def test_an_error_of_page_locking_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise torch would report it after the next, unrelated kernel."""
    calls: list[Any] = []
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaHostUnregister=lambda *_: calls.append("unlock"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    fill = torch.Tensor.fill_

    def fill_and_report(tensor: torch.Tensor, value: float) -> torch.Tensor:
        calls.append(tensor.shape)
        fill(tensor, value)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "fill_", fill_and_report)
    PageLock(torch.empty(8, dtype=torch.uint8), CPU).close()
    assert calls == [torch.Size([1])], "one kernel, whose error is dropped, and nothing to unlock"
