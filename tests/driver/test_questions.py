"""Questions that the driver answers at any time, by scripted sockets."""

from hetis.core import messages as m
from hetis.core.device_info import RankStats
from tests.driver.scripted import AGENT, END, FRONT, OTHER_FRONT, Script, Sockets, attach, request, run


def test_the_state_of_a_fleet_is_told_at_once_also_during_start_up(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.StatusQuery(), m.FleetSnapshotQuery())
        yield None
        status, snapshot = sockets.take("front", FRONT)
        assert status == m.EngineStatus()
        assert (snapshot.status, snapshot.devices, snapshot.sequences) == (m.EngineStatus(), [], [])
        yield from attach(sockets, FRONT)
        sockets.put("front", FRONT, request("a", max_tokens=3), request("b", max_tokens=3))
        yield None
        sockets.answer_step()
        yield None
        sockets.put("front", FRONT, m.StatusQuery(), m.FleetSnapshotQuery(max_sequences=1))
        sockets.now += 3.0  # without heartbeats, and with a step in flight
        yield None
        outputs, status, snapshot = sockets.take("front", FRONT)
        assert outputs.status.step == 1
        assert (status.step, status.num_running, status.num_waiting) == (1, 2, 0)
        assert status.in_flight_seconds == 3.0
        assert [sentence.partition(" (")[0] for sentence in status.silent] == ["rank 0", "rank 1"]
        assert [(each.id, each.num_tokens) for each in snapshot.sequences] == [("a", 4)]
        assert [event.sequence_id for event in snapshot.events] == ["a", "b"]
        assert [device.silent_seconds for device in snapshot.devices] == [3.0, 3.0]
        yield END

    run(sockets, script())


def test_ranks_are_asked_for_their_counters_while_a_front_end_watches(sockets: Sockets) -> None:
    """The first snapshot does not wait for them."""

    def script() -> Script:
        yield from sockets.come_up()
        sockets.put("front", FRONT, m.FleetSnapshotQuery())
        sockets.put("front", OTHER_FRONT, m.FleetSnapshotQuery())
        yield None
        (first,), (other,) = sockets.take("front", FRONT), sockets.take("front", OTHER_FRONT)
        assert first.links == other.links == []
        assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [m.StatsQuery()], "asked once"
        for rank in (0, 1):
            stats = RankStats(rank=rank, bytes_sent={f"{rank}->{1 - rank}": 10 + rank})
            sockets.put("ranks", str(rank).encode(), m.Stats(stats=stats))
        yield None
        assert sockets.take("front", FRONT) == [], "it has had its answer"
        sockets.put("front", FRONT, m.FleetSnapshotQuery())
        yield None
        (second,) = sockets.take("front", FRONT)
        assert [(link.source, link.target, link.num_bytes) for link in second.links] == [(0, 1, 10), (1, 0, 11)]
        yield END

    run(sockets, script())


def test_questions_of_agents_are_answered_and_heartbeats_are_not(sockets: Sockets) -> None:
    def script() -> Script:
        yield from sockets.come_up()
        sockets.put("health", b"1", m.Heartbeat(rank=1, step=3))
        sockets.put("agents", AGENT, m.Ping())
        yield None
        assert sockets.take("agents", AGENT) == [m.Pong()]
        assert sockets.sent == []
        yield END

    run(sockets, script())


def test_values_go_from_rank_to_rank_at_any_time(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("board", b"1", m.LookUp(key="link"))
        yield None
        assert sockets.sent == []
        yield from sockets.come_up()
        sockets.put("board", b"0", m.Publish(key="link", value=b"here"))
        yield None
        assert sockets.take("board", b"1") == [m.Published(key="link", value=b"here")]
        assert sockets.sent == []
        sockets.put("board", b"0", m.LookUp(key="link"))
        yield None
        assert sockets.take("board", b"0") == [m.Published(key="link", value=b"here")]
        yield END

    run(sockets, script())
