"""The step that heartbeats report as done: the driver names ranks that lack a step as the cause of one that is late."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from hetis.core.messages import StepTimes
from hetis.core.messages.step_command import Step
from hetis.core.sampling_params import SamplingParams
from hetis.ranks.rank import build_member
from hetis.ranks.worker import StageServer
from tests.checkpoints import make_checkpoint
from tests.engine import local_fleet
from tests.engine.local_fleet import LocalFleet
from tests.processes.look import DEADLINE, wait_until

WORKER = 2
GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


def test_a_worker_has_finished_a_step_when_all_its_stages_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members: dict[int, Any] = {}
    first_stage_is_done, last_stage_may_begin = threading.Event(), threading.Event()
    serve = StageServer.serve

    def build_and_keep(setup: Any, rank: int, *arguments: Any) -> Any:
        members[rank] = build_member(setup, rank, *arguments)
        return members[rank]

    def serve_late(self: StageServer, step: Step) -> StepTimes:
        if threading.current_thread().name == "stage 1":
            assert last_stage_may_begin.wait(DEADLINE)
        times = serve(self, step)
        first_stage_is_done.set()
        return times

    monkeypatch.setattr(local_fleet, "build_member", build_and_keep)
    monkeypatch.setattr(StageServer, "serve", serve_late)
    stages = [{"layers": 1, "primaries": [{}]}, {"primaries": [{}]}]
    (tmp_path / "plan.json").write_text(json.dumps({"stages": stages, "attention": [{}]}))
    with LocalFleet(make_checkpoint(tmp_path, "llama3"), str(tmp_path / "plan.json")) as fleet:
        generating = threading.Thread(target=fleet.generate, args=([[3, 1, 4]], GREEDY))
        generating.start()
        assert first_stage_is_done.wait(DEADLINE)
        assert members[WORKER].last_step == -1
        last_stage_may_begin.set()
        generating.join(DEADLINE)
        for member in members.values():
            wait_until(lambda member=member: member.last_step == 2, "all three steps are done")
