"""The engine alone, without ranks: time comes in with each call."""

import msgspec
import pytest

from hetis.core.messages import AddRequest, StepResult
from hetis.core.sampling_params import SamplingParams
from hetis.dispatcher.simple_dispatchers import PrimaryOnlyDispatcher
from hetis.engine.engine import LOG_SECONDS, Engine
from hetis.engine.policies import Policies
from tests.engine.measured_fleet import Fleet, make_plan

PROMPT = [5] * 30


def make_engine(num_pages: int) -> Engine:
    """One primary with so many pages of 16 tokens."""
    fleet = Fleet(make_plan([1], 0), [("host", "cpu", "device")])
    setup = msgspec.structs.replace(fleet.setup, num_pages={0: num_pages}, max_model_len=64)
    return Engine(setup, Policies(PrimaryOnlyDispatcher()))


def add(engine: Engine, name: str) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.add(AddRequest(id=name, token_ids=PROMPT, prompt_len=len(PROMPT), seed=0, params=params), 0.0)


def run_step(engine: Engine, now: float) -> None:
    """One step in which one row samples."""
    command = engine.step(now)
    assert command is not None
    engine.on_result(StepResult(step=command.step, tokens=[7]), now)


def test_why_a_request_waits_is_logged_once_per_interval(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="hetis")
    engine, begin = make_engine(num_pages=4 * 4), 5000.0
    add(engine, "first")
    run_step(engine, begin)
    add(engine, "0:second/0")
    lines = []
    for seconds in (0.0, 0.1, 0.2, LOG_SECONDS, LOG_SECONDS + 0.1, 2 * LOG_SECONDS + 0.1):
        run_step(engine, begin + seconds)
        lines.append(len([record for record in caplog.records if "request second waits" in record.getMessage()]))
    assert lines == [0, 1, 1, 1, 2, 3], "the dispatcher has to refuse it first"
