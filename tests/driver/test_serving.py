"""A fleet that is up: steps go to all ranks, and each front end gets the answers to its own messages."""

import msgspec

from hetis.core import messages as m
from hetis.core.batch import YOURS
from hetis.core.device_info import RankStats
from hetis.core.messages.step_command import decode
from tests.driver.scripted import (
    END,
    FRONT,
    OTHER_FRONT,
    THIRD_FRONT,
    Script,
    Sockets,
    attach,
    request,
    run,
    take_tokens,
)


def test_steps_go_to_all_ranks_and_tokens_to_the_front_end_that_asked(sockets: Sockets) -> None:
    """Two front ends use one id."""

    def script() -> Script:
        yield from attach(sockets, FRONT, OTHER_FRONT, THIRD_FRONT)
        sockets.put("front", FRONT, request("a", max_tokens=3), request("b", max_tokens=1))
        sockets.put("front", OTHER_FRONT, request("a", max_tokens=2))
        yield None
        for _ in range(3):
            sockets.answer_step()
            yield None
        assert take_tokens(sockets, FRONT) == {"a": ([7, 7, 7], "length"), "b": ([7], "length")}
        assert take_tokens(sockets, OTHER_FRONT) == {"a": ([7, 7], "length")}
        assert take_tokens(sockets, THIRD_FRONT) == {}
        yield END

    run(sockets, script())


def test_a_front_end_aborts_only_its_own_sequences(sockets: Sockets) -> None:
    def script() -> Script:
        yield from attach(sockets, FRONT, OTHER_FRONT)
        sockets.put("front", FRONT, request("a", max_tokens=2))
        sockets.put("front", OTHER_FRONT, request("b"))
        yield None
        sockets.answer_step()
        sockets.put("front", OTHER_FRONT, m.AbortRequest(id="a"), m.AbortRequest(id="b"))
        yield None
        sockets.answer_step()
        yield None
        assert take_tokens(sockets, FRONT) == {"a": ([7, 7], "length")}
        assert take_tokens(sockets, OTHER_FRONT)["b"][1] == "abort"
        yield END

    run(sockets, script())


def test_a_step_is_sent_while_ranks_compute_the_one_before(sockets: Sockets) -> None:
    def script() -> Script:
        yield from attach(sockets, FRONT)
        sockets.put("front", FRONT, request("a", max_tokens=3))
        yield None
        first, second = sockets.take("ranks", b"0")
        assert [first.step, second.step] == [0, 1]
        assert decode(second, 0).token_T.tolist() == [YOURS]
        sockets.answer(first)
        yield None
        (third,) = sockets.take("ranks", b"0")
        assert decode(third, 0).token_T.tolist() == [YOURS]
        assert take_tokens(sockets, FRONT) == {"a": ([7], None)}
        sockets.answer(second)
        yield None
        assert sockets.take("ranks", b"0") == [], "the end by length is known"
        sockets.answer(third)
        yield None
        assert take_tokens(sockets, FRONT) == {"a": ([7, 7], "length")}
        yield END

    run(sockets, script(), async_scheduling=True)


def test_a_request_that_can_never_run_is_refused_and_the_others_go_on(sockets: Sockets) -> None:
    def script() -> Script:
        yield from attach(sockets, FRONT)
        endless = msgspec.structs.replace(request("endless"), token_ids=[1] * 100_000)
        sockets.put("front", FRONT, endless, request("good", max_tokens=1))
        yield None
        (refused,) = sockets.take("front", FRONT)[0].outputs
        assert (refused.id, refused.finish_reason) == ("endless", "error")
        sockets.answer_step()
        yield None
        assert [one.finish_reason for each in sockets.take("front", FRONT) for one in each.outputs] == ["length"]
        yield END

    run(sockets, script())


def test_a_request_that_is_aborted_gets_no_more_steps(sockets: Sockets) -> None:
    def script() -> Script:
        yield from attach(sockets, FRONT)
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
        assert [message for message in sockets.take("ranks", b"0") if message.sampling_rows] == []
        yield END

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
        yield END

    run(sockets, script())
