"""The trace of a whole fleet: valid JSON, every rank and step, bars that fill a step without overlap."""

import json
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hetis.core.messages import StepTimes
from hetis.core.sampling_params import SamplingParams
from hetis.driver.trace import TraceFile
from tests.checkpoints import make_checkpoint
from tests.engine.local_fleet import LocalFleet, RandomDispatcher
from tests.engine.test_parity import prompts


def run(directory: Path, plan: str, seed: int = 3) -> tuple[LocalFleet, list[StepTimes]]:
    """The times that all ranks report of a few requests."""
    times: list[StepTimes] = []
    with LocalFleet(directory, plan, dispatcher=RandomDispatcher(seed), trace="wanted") as fleet:
        fleet.engine.on_times = times.append  # type: ignore[method-assign]
        fleet.generate(prompts(), SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    while not fleet.times.empty():  # of ranks that were not done when the last token came
        times.append(fleet.times.get())
    num_steps = 1 + max(each.step for each in times)
    assert {(each.rank, each.step) for each in times} == {(r, s) for r in range(3) for s in range(num_steps)}
    return fleet, times


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "five_groups")


def test_every_step_of_every_rank_is_in_the_file(directory: Path, tmp_path: Path):
    epoch = time.time()
    fleet, times = run(directory, "1+2")
    path = tmp_path / "trace.json"
    trace = TraceFile(path, fleet.setup.plan, fleet.setup.fleet, epoch)
    for each in times:
        trace.add(each)
    trace.close()
    events = json.loads(path.read_text())
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"rank 0: primary on cpu", "rank 1: attention worker on cpu", "rank 2: attention worker on cpu"}
    bars = [event for event in events if event["ph"] == "X"]
    assert min(bar["ts"] for bar in bars) >= 0, "viewers drop events before 0"
    seen = {rank: {bar["name"] for bar in bars if bar["pid"] == rank} for rank in range(3)}
    assert {"dense", "attention", "send", "wait", "append", "prompt", "other"} <= seen[0]
    assert {"attention", "send", "wait", "append"} <= seen[1]
    assert "dense" not in seen[1]


def test_laps_fill_a_step(directory: Path, tmp_path: Path):
    _, times = run(directory, "1+2")
    for each in times:
        for stage in each.stages:
            assert sum(stage.activity_us) > 0
            laps = _laps(stage.trace)
            assert all(begin <= end for _, begin, end in laps)
            assert all(first[2] == second[1] for first, second in pairwise(laps)), "a gap or an overlap"
            assert sum(end - begin for _, begin, end in laps) * 1e6 == pytest.approx(sum(stage.activity_us), rel=1e-6)


def test_a_trace_file_that_cannot_be_written_is_named(directory: Path, tmp_path: Path):
    fleet, _ = run(directory, "1+2")
    with pytest.raises(ValueError, match=r"nowhere/trace.json cannot be written \(No such file"):
        TraceFile(tmp_path / "nowhere" / "trace.json", fleet.setup.plan, fleet.setup.fleet, 0.0)


def test_a_pipe_is_refused_at_once(directory: Path, tmp_path: Path):
    fleet, _ = run(directory, "1+2")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe or socket"):
        TraceFile(tmp_path / "pipe", fleet.setup.plan, fleet.setup.fleet, 0.0)


def _laps(trace: bytes) -> list[list[float]]:
    found: list[list[float]] = np.frombuffer(trace, dtype=np.float64).reshape(-1, 3).tolist()
    return found


def test_a_full_disk_ends_the_trace_and_not_the_fleet(directory: Path, caplog: pytest.LogCaptureFixture):
    fleet, times = run(directory, "1+2")
    trace = TraceFile(Path("/dev/full"), fleet.setup.plan, fleet.setup.fleet, 0.0)
    for each in times * 20:  # more than a buffer holds
        trace.add(each)
    trace.close()
    [record] = caplog.records
    assert record.getMessage() == "trace file /dev/full is cut off: No space left on device."
