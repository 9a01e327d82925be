"""Front ends that leave, and messages that the driver does not obey, by scripted sockets."""

import subprocess

import pytest

from hetis.core import messages as m
from hetis.core.device_info import RankStats
from hetis.core.messages.step_command import decode
from tests.driver.scripted import ATTACH, END, FRONT, OTHER_FRONT, Script, Sockets, attach, request, run, take_tokens


@pytest.mark.parametrize("how", ["detaches", "dies"])
def test_a_front_end_that_goes_away_costs_only_its_own_sequences(sockets: Sockets, how: str) -> None:
    child = subprocess.Popen(["sleep", "1000"])

    def script() -> Script:
        sockets.put("front", OTHER_FRONT, m.Attach(pid=child.pid))
        yield from attach(sockets, FRONT)
        assert [type(message) for message in sockets.take("front", OTHER_FRONT)] == [m.EngineReady]
        sockets.put("front", FRONT, request("a", max_tokens=3))
        sockets.put("front", OTHER_FRONT, request("a", max_tokens=50), request("b", max_tokens=50))
        yield None
        assert len(decode(sockets.answer_step(), 0).sampling_row_I) == 3
        if how == "detaches":
            sockets.put("front", OTHER_FRONT, m.Detach(), request("late"))
            yield None
        else:
            child.kill()
            child.wait()
            yield [(sockets.registered[1], 1)]  # the first one is `OWNER`
        sockets.put("front", OTHER_FRONT, request("later"))
        for _ in range(2):
            assert len(decode(sockets.answer_step(), 0).sampling_row_I) == 1, "of the other front end"
            yield None
        assert take_tokens(sockets, FRONT) == {"a": ([7, 7, 7], "length")}
        errors = {name: reason for name, (_, reason) in take_tokens(sockets, OTHER_FRONT).items() if reason}
        assert errors == dict.fromkeys(["late", "later"] if how == "detaches" else ["later"], "error"), "not attached"
        sockets.put("front", FRONT, m.FleetQuery())
        yield None
        for rank in (b"0", b"1"):
            sockets.put("ranks", rank, m.Stats(stats=RankStats(rank=int(rank))))
        yield None
        [stats] = sockets.take("front", FRONT)
        assert [member.pages_used for member in stats.members] == [0, 0]
        yield END

    try:
        run(sockets, script())
    finally:
        child.kill()
        child.wait()


def test_what_cannot_be_obeyed_is_answered(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.Attach(pid=1 << 30), request("early"))
        yield from attach(sockets, OTHER_FRONT)
        sockets.put("front", FRONT, request("a"), m.AbortRequest(id="a"), m.Detach())
        yield None
        refused, early, first, ended = sockets.take("front", FRONT)
        assert "no process" in refused.reason
        assert "not up yet" in early.outputs[0].error
        assert "not attached" in first.outputs[0].error
        assert ended.outputs[0].finish_reason == "abort"
        sockets.put("front", OTHER_FRONT, request("a"), request("a"), ATTACH)
        yield None
        twice, ready = sockets.take("front", OTHER_FRONT)
        assert "in use" in twice.reason
        assert isinstance(ready, m.EngineReady)
        for _ in range(2):
            sockets.answer_step()
            yield None
        assert take_tokens(sockets, OTHER_FRONT) == {"a": ([7, 7], "length")}, "the second one changes nothing"
        yield END

    run(sockets, script())
