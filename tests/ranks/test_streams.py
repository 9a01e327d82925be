"""Each stage of a worker works on a stream of its own: index tensors, tables, links, kernels and the stopwatch.

And few Python frames lie between a command and the kernel that attends over a worker's lanes.
"""

import json
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from hetis.comm.links.local import LocalLink
from hetis.core.messages import Setup
from hetis.core.sampling_params import SamplingParams
from hetis.ranks import primary, split_attention, worker
from hetis.ranks.pool import PagePool
from hetis.ranks.step_input import StepPlanner
from hetis.ranks.stopwatch import HostStopwatch
from tests.checkpoints import make_checkpoint
from tests.engine.local_fleet import LocalFleet, RandomDispatcher

current = threading.local()


class FakeStream:
    """Current for the thread that enters it."""

    def __init__(self, device: torch.device) -> None:
        del device

    def __enter__(self) -> None:
        current.stream = self

    def __exit__(self, *error: object) -> None:
        current.stream = None


class StreamRecorder:
    """Wraps functions, and keeps which streams were current in calls by threads of a worker's stages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.seen: dict[str, set[tuple[int, FakeStream | None]]] = {}

    def watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)
        seen = self.seen.setdefault(name, set())

        def watched(*arguments: Any, **keywords: Any) -> Any:
            if threading.current_thread().name.startswith("stage "):
                seen.add((threading.get_ident(), getattr(current, "stream", None)))
            return original(*arguments, **keywords)

        self._monkeypatch.setattr(owner, name, watched)


def test_all_work_of_a_stage_is_on_its_own_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "own_stream", FakeStream)
    recorder = StreamRecorder(monkeypatch)
    for owner, names in {
        worker: ("kv_append", "paged_decode"),
        StepPlanner: ("apply", "worker_input"),
        PagePool: ("apply",),
        LocalLink: ("send_buffer", "send", "recv", "release"),
        HostStopwatch: ("begin", "lap", "read"),
    }.items():
        for name in names:
            recorder.watch(owner, name)
    plan = tmp_path / "plan.json"
    stages = [{"layers": 1, "primaries": [{}]} for _ in range(3)]
    plan.write_text(json.dumps({"stages": stages, "attention": [{}]}))
    with LocalFleet(make_checkpoint(tmp_path, "llama3"), str(plan), dispatcher=RandomDispatcher(1)) as fleet:
        fleet.generate([[3, 1, 4]] * 4, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    for name, seen in recorder.seen.items():
        assert len(seen) == 3, f"{name}: a thread for each stage, and one stream for each thread"
        assert len({stream for _, stream in seen}) == 3, f"{name}: two stages share a stream"
        assert None not in {stream for _, stream in seen}, f"{name} is called on the default stream"


def test_every_launch_of_decode_attention_has_memory_of_its_stage_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large as the lanes of a primary, or of the largest home that a stage of a worker serves, may need."""
    made: list[tuple[int, torch.Tensor]] = []
    used: dict[int, set[int]] = {}  # by memory: threads

    def make(setup: Setup, num_groups: int, device: torch.device) -> torch.Tensor:
        made.append((num_groups, torch.empty(1)))
        return made[-1][1]

    for module in (worker, primary):
        monkeypatch.setattr(module, "decode_scratch", make)
    for module in (worker, split_attention):
        decode = module.paged_decode

        def watched(*arguments: Any, scratch: torch.Tensor, decode: Any = decode, **keywords: Any) -> None:
            used.setdefault(scratch.data_ptr(), set()).add(threading.get_ident())
            decode(*arguments, scratch=scratch, **keywords)

        monkeypatch.setattr(module, "paged_decode", watched)
    plan = {
        "stages": [{"layers": 1, "primaries": [{"head_groups": 3}, {}]}, {"primaries": [{}]}],
        "attention": [{}],
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    checkpoint = make_checkpoint(tmp_path, "five_groups")
    with LocalFleet(checkpoint, str(tmp_path / "plan.json"), dispatcher=RandomDispatcher(1)) as fleet:
        groups = fleet.setup.spec.num_head_groups
        fleet.generate([[3, 1, 4]] * 4, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    of_primaries, of_worker = [3, groups - 3, groups], [max(3, groups - 3), groups]
    assert sorted(count for count, _ in made) == sorted(of_primaries + of_worker)
    assert used.keys() == {memory.data_ptr() for _, memory in made}
    assert all(len(threads) == 1 for threads in used.values()), "two threads share one"


def frames_since_command() -> int | None:
    """Python frames of the caller's caller and those below it, down to a worker's loop; None on a primary."""
    found, frame = [], sys._getframe(2)
    while frame is not None:
        found.append(frame.f_code)
        if frame.f_code in (LocalFleet._rank.__code__, worker.AttentionWorker._obey.__code__):
            return len(found) if worker.StageServer.serve.__code__ in found else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


@pytest.mark.parametrize("num_stages", [1, 2])
def test_at_most_four_frames_lie_between_a_command_and_the_kernel(
    num_stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's decode token: the loop over commands, the worker (without threads), its stage, and the launcher."""
    depths: set[int] = set()
    module = import_module("hetis_kernels.paged_decode")
    select = module.select

    def counting(*arguments: Any) -> Callable[..., None]:
        def kernel(*tensors: Any) -> None:
            if (depth := frames_since_command()) is not None:
                depths.add(depth)
            selected(*tensors)

        selected = select(*arguments)
        return kernel

    monkeypatch.setattr(module, "select", counting)
    plan = tmp_path / "plan.json"
    stages = [{"layers": 1, "primaries": [{}]}, {"primaries": [{}]}][2 - num_stages :]
    plan.write_text(json.dumps({"stages": stages, "attention": [{}]}))
    with LocalFleet(make_checkpoint(tmp_path, "llama3"), str(plan), dispatcher=RandomDispatcher(1)) as fleet:
        fleet.generate([[3, 1, 4]] * 4, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert depths
    assert max(depths) <= 4
