"""The driver from the first hello to the end: who is told what, and when."""

from collections import defaultdict
from pathlib import Path

import pytest

from hetis.comm import supervision
from hetis.core import messages as m
from hetis.core.fleet import RankStats
from hetis.core.sampling_params import SamplingParams
from hetis.engine import driver
from hetis.engine.driver import verdict_on
from hetis.engine.watch import GRACE_SECONDS, FleetFailedError, Watch
from tests.engine.driver_script import FRONT, OTHER_FRONT, STDIN, Script, Sockets, request, run, set_last_word
from tests.engine.measured_fleet import answer


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Sockets:
    found = Sockets()
    monkeypatch.setattr(driver, "Watch", lambda plan, timeout: Watch(plan, timeout, clock=lambda: found.now))
    monkeypatch.setattr(driver, "END_SECONDS", 0.0)
    monkeypatch.setattr(driver, "FAIL_SECONDS", 0.0)
    set_last_word(monkeypatch, b"")
    return found


# --- joining ----------------------------------------------------------------------------------------------------------


def test_the_setup_goes_to_all_when_the_last_has_joined(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.hello(1)
        yield None
        assert sockets.sent == []
        sockets.hello(0)
        yield None
        (setup,), (same,) = sockets.take("ranks", b"0"), sockets.take("ranks", b"1")
        assert setup == same
        assert [info.rank for info in setup.fleet] == [0, 1]
        assert setup.eos_token_ids == [3]
        sockets.put("front", FRONT, m.Shutdown())
        yield None

    run(sockets, script())
    assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [m.Shutdown()]


def test_a_plan_that_does_not_fit_is_refused_with_the_numbers(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.hello(0, free_memory=1 << 10)
        sockets.hello(1)
        yield None

    with pytest.raises(ValueError, match=r"ranks 0, 1 on cpu: .* do not fit") as caught:
        run(sockets, script())
    assert verdict_on(caught.value, sockets.driver.is_up).refused
    assert sockets.sent == [], "nobody has begun to load"


def test_front_ends_are_greeted_when_the_fleet_is_up_and_not_before(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.Attach())
        yield from sockets.come_up()
        (greeting,) = sockets.take("front", FRONT)
        assert (greeting.max_model_len, greeting.vocab_size, greeting.eos_token_ids) == (64, 512, [3])
        assert sockets.is_hidden, "nobody else can join in"
        sockets.put("front", OTHER_FRONT, m.Attach())
        yield None
        assert sockets.take("front", OTHER_FRONT) == [greeting]
        sockets.put("front", FRONT, m.Shutdown())
        yield None

    run(sockets, script())


def test_what_comes_before_the_fleet_is_up_costs_nobody_anything(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.Attach(), request("early"), m.AbortRequest(id="early"), m.FleetQuery())
        yield None
        answers = sockets.take("front", FRONT)
        assert [answer.outputs[0].finish_reason for answer in answers] == ["error", "error"]
        assert "not up yet" in answers[0].outputs[0].error
        sockets.hello(0)
        sockets.hello(1)
        yield None
        for rank in (0, 1):
            sockets.ready(rank)
        yield None
        for rank in (b"0", b"1"):
            assert [type(message) for message in sockets.take("ranks", rank)] == [m.Setup, m.StatsQuery]
            sockets.put("ranks", rank, m.Stats(stats=RankStats(rank=int(rank))))
        yield None
        assert [type(message) for message in sockets.take("front", FRONT)] == [m.EngineReady, m.FleetStats]
        sockets.put("front", FRONT, m.Shutdown())
        yield None

    run(sockets, script())


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_fleet_is_up_when_all_is_measured(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.Attach())
        sockets.hello(0)
        sockets.hello(1)
        yield None
        for rank in (b"0", b"1"):
            assert [type(message) for message in sockets.take("ranks", rank)] == [m.Setup]
            sockets.ready(int(rank))
        yield None
        num_measured = 0
        while asked := [(rank, each) for rank in (0, 1) for each in sockets.take("ranks", str(rank).encode())]:
            assert not any(isinstance(message, m.EngineReady) for message in sockets.take("front", FRONT))
            for rank, message in asked:
                num_measured += 1
                sockets.put("ranks", str(rank).encode(), answer(rank, message))
            yield None
        assert num_measured >= 4, "attention, dense, and a link at both ends"
        assert [type(message) for message in sockets.take("front", FRONT)][-1] is m.EngineReady
        sockets.put("front", FRONT, m.ProfileQuery())
        yield None
        (report,) = sockets.take("front", FRONT)
        assert sorted(report.profile.devices) == [0, 1]
        assert [(link.primary, link.worker) for link in report.profile.links] == [(0, 1)]
        sockets.put("front", FRONT, m.Shutdown())
        yield None

    run(sockets, script(), dispatch="hetis")


# --- serving ----------------------------------------------------------------------------------------------------------


def test_steps_go_to_all_ranks_and_tokens_to_all_front_ends(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.Attach())
        sockets.put("front", OTHER_FRONT, m.Attach())
        yield from sockets.come_up()
        sockets.put("front", FRONT, request("a"), request("b", max_tokens=1))
        yield None
        found: dict[str, list[int]] = defaultdict(list)
        ends: dict[str, str | None] = {}
        while len([end for end in ends.values() if end]) < 2:
            sockets.answer_step()
            yield None
            outputs = [each for each in sockets.take("front", FRONT) if isinstance(each, m.Outputs)]
            assert outputs == [each for each in sockets.take("front", OTHER_FRONT) if isinstance(each, m.Outputs)]
            for output in (one for each in outputs for one in each.outputs):
                found[output.id] += output.token_ids
                ends[output.id] = output.finish_reason
        assert found == {"a": [7, 7], "b": [7]}
        assert ends == {"a": "length", "b": "length"}
        sockets.put("front", FRONT, m.Shutdown())
        yield None

    run(sockets, script())


def test_one_that_can_never_run_is_refused_and_the_others_go_on(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.Attach())
        yield from sockets.come_up()
        sockets.take("front", FRONT)
        endless = m.AddRequest(id="endless", token_ids=[1] * 100_000, params=SamplingParams())
        strange = m.AddRequest(id="strange", token_ids=[1, 512], params=SamplingParams())
        sockets.put("front", FRONT, endless, strange, request("good", max_tokens=1))
        yield None
        refused = sockets.take("front", FRONT)[0].outputs
        assert [(each.id, each.finish_reason) for each in refused] == [("endless", "error"), ("strange", "error")]
        sockets.answer_step()
        yield None
        assert [one.finish_reason for each in sockets.take("front", FRONT) for one in each.outputs] == ["length"]
        sockets.put("front", FRONT, m.Shutdown())
        yield None

    run(sockets, script())


def test_a_request_that_is_aborted_gets_no_more_steps(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.Attach())
        yield from sockets.come_up()
        sockets.put("front", FRONT, request("a", max_tokens=50))
        yield None
        command = sockets.answer_step()
        assert command.admitted
        yield None
        sockets.answer_step()
        sockets.put("front", FRONT, m.AbortRequest(id="a"), m.AbortRequest(id="never was"))
        yield None
        sockets.take("ranks", b"0")
        yield None
        assert [message for message in sockets.take("ranks", b"0") if message.sampled] == []
        sockets.put("front", FRONT, m.Shutdown())
        yield None

    run(sockets, script())


def test_one_question_to_the_ranks_answers_all_front_ends(sockets: Sockets) -> None:
    def script() -> Script:
        yield from sockets.come_up()
        sockets.put("front", FRONT, m.FleetQuery())
        sockets.put("front", OTHER_FRONT, m.FleetQuery())
        yield None
        assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [m.StatsQuery()]
        sockets.put("ranks", b"1", m.Stats(stats=RankStats(rank=1, attention_seconds=2.0)))
        yield None
        assert sockets.sent == [], "rank 0 has not answered"
        sockets.put("ranks", b"0", m.Stats(stats=RankStats(rank=0, attention_seconds=6.0)))
        yield None
        (one,), (other,) = sockets.take("front", FRONT), sockets.take("front", OTHER_FRONT)
        assert one == other
        assert [member.attention_share for member in one.members] == [0.75, 0.25]
        sockets.put("front", FRONT, m.Shutdown())
        yield None

    run(sockets, script())


# --- the end ----------------------------------------------------------------------------------------------------------


def test_rank_0_can_end_the_job_in_order(sockets: Sockets, monkeypatch: pytest.MonkeyPatch) -> None:
    set_last_word(monkeypatch, supervision.END)

    def script() -> Script:
        yield from sockets.come_up()
        yield [(STDIN, 1)]

    run(sockets, script())
    assert [message for *_, message in sockets.sent if isinstance(message, m.Shutdown)] == [m.Shutdown()] * 2


@pytest.mark.parametrize(("word", "words"), [(b"", "was killed by SIGKILL"), (supervision.TOLD, "told to end")])
def test_the_end_of_rank_0_is_the_end_of_the_fleet(
    word: bytes, words: str, sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_last_word(monkeypatch, word)
    monkeypatch.setattr(supervision, "await_status", lambda pid, seconds: 9)

    def script() -> Script:
        yield from sockets.come_up()
        yield [(STDIN, 1)]
        sockets.now += GRACE_SECONDS + 1
        yield None

    with pytest.raises(FleetFailedError, match=words) as caught:
        run(sockets, script())
    assert "rank 0" in str(caught.value)


def test_heartbeats_are_answered(sockets: Sockets) -> None:
    def script() -> Script:
        yield from sockets.come_up()
        sockets.put("health", b"1", m.Heartbeat(rank=1, step=3))
        yield None
        assert sockets.take("health", b"1") == [m.Pong()]
        sockets.put("front", FRONT, m.Shutdown())
        yield None

    run(sockets, script())


def test_a_failure_is_told_to_everybody_once(sockets: Sockets, tmp_path: Path) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.Attach())
        yield from sockets.come_up()
        sockets.take("front", FRONT)
        sockets.put("health", b"1", m.Failure(rank=1, reason="MemoryError: no more", traceback="Traceback …"))
        yield None

    with pytest.raises(FleetFailedError, match=r"rank 1 .* failed: MemoryError: no more") as caught:
        run(sockets, script(), tmp_path)
    sockets.driver.fail(caught.value)
    assert sockets.take("front", FRONT) == [m.EngineDead(reason=str(caught.value))]
    for rank in (b"0", b"1"):
        aborts = sockets.take("health", rank)
        assert m.Abort(reason=str(caught.value)) in aborts
    found = supervision.read_verdict(tmp_path)
    assert found == supervision.Verdict(str(caught.value), refused=False)


def test_a_silent_rank_is_killed_by_its_neighbours(sockets: Sockets, tmp_path: Path) -> None:
    def script() -> Script:
        yield from sockets.come_up()
        sockets.now += 9.0
        sockets.put("health", b"0", m.Heartbeat(rank=0, step=-1))
        yield None
        sockets.now += 2.0
        yield None

    with pytest.raises(FleetFailedError, match="rank 1") as caught:
        run(sockets, script(), tmp_path, step_timeout=10.0)
    assert caught.value.culprits == {"elsewhere": [1001]}
    sockets.driver.fail(caught.value)
    assert m.Abort(reason=str(caught.value), host="elsewhere", culprits=[1001]) in sockets.take("health", b"0")
