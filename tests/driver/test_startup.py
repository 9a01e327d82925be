"""From the first hello until the fleet is up: what ranks and front ends get, and when."""

import re

from hetis.core import messages as m
from hetis.core.device_info import RankStats
from tests.driver.scripted import ATTACH, END, FRONT, OTHER_FRONT, Script, Sockets, request, run, run_failing


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
        yield END

    run(sockets, script())
    assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [m.Shutdown()]


def test_a_plan_that_does_not_fit_is_refused_with_the_numbers(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.hello(0, free_memory=1 << 10)
        sockets.hello(1)
        yield None

    reason = run_failing(sockets, script())
    assert re.search(r"ranks 0, 1 on cpu: .* do not fit", reason.text)
    assert reason.refused
    assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [], "no rank has begun to load"


def test_front_ends_get_ready_when_the_fleet_is_up_and_not_before(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, ATTACH)
        yield from sockets.come_up()
        (ready,) = sockets.take("front", FRONT)
        assert (ready.max_model_len, ready.vocab_size, ready.eos_token_ids) == (64, 512, [3])
        sockets.put("front", OTHER_FRONT, ATTACH)
        yield None
        assert sockets.take("front", OTHER_FRONT) == [ready]
        yield END

    run(sockets, script())


def test_requests_before_the_fleet_is_up_are_refused_and_questions_wait(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, ATTACH, request("early"), m.AbortRequest(id="early"))
        sockets.put("front", FRONT, m.FleetQuery(), m.FleetQuery())
        sockets.put("front", OTHER_FRONT, m.ProfileQuery())
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
        assert [type(message) for message in sockets.take("front", OTHER_FRONT)] == [m.ProfileReport]
        yield END

    run(sockets, script())


def test_a_trace_file_that_cannot_be_written_is_refused_before_ranks_load(sockets: Sockets) -> None:
    """By the driver: the front end, which has looked at it before, may have another standard output, for example."""

    def script() -> Script:
        sockets.hello(0)
        sockets.hello(1)
        yield None

    reason = run_failing(sockets, script(), trace="/no/such/folder/trace.json")
    assert reason.refused
    assert "trace file /no/such/folder/trace.json cannot be written" in reason.text
    assert sockets.take("ranks", b"0") == []
