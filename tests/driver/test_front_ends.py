"""What the driver keeps about front ends: which are attached and live, ids of their sequences, their questions."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from hetis.comm.control import ControlClient, ControlServer
from hetis.core import messages as m
from hetis.core.device_info import RankStats
from hetis.core.messages import TokenOutput
from hetis.driver.front_ends import FrontEnds, SequenceIds, StatsCollector
from hetis.processes import supervision
from tests.processes.look import DEADLINE, wait_until

# --- who is attached --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(directory: Path) -> Iterator[ControlServer]:
    server = ControlServer(str(directory), None)
    yield server
    server.close()


def client(server: ControlServer, name: str) -> ControlClient:
    return ControlClient(server.endpoints.front, name, "front")


def turn(server: ControlServer, fronts: FrontEnds) -> list[tuple[bytes, m.Message]]:
    """What a turn of the driver does with front ends."""
    fronts.notice_ends(dict(server.poller.poll(20)))
    return list(fronts.receive())


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_the_end_of_a_front_end_is_noticed(server: ControlServer, monkeypatch: pytest.MonkeyPatch, has_pidfd: bool):
    if not has_pidfd:
        monkeypatch.setattr(supervision, "open_pidfd", lambda pid: None)
    fronts = FrontEnds(server)
    child = subprocess.Popen(["sleep", "1000"])
    mine, other = client(server, "mine"), client(server, "child")
    mine.send(m.Attach(pid=os.getpid()))
    other.send(m.Attach(pid=child.pid))
    wait_until(lambda: (turn(server, fronts) and len(fronts.attached) == 2) or len(fronts.attached) == 2, "both came")
    assert fronts.take_gone() == []
    child.kill()
    wait_until(lambda: turn(server, fronts) == [] and not fronts.is_attached(b"child"), "its end is noticed")
    assert fronts.take_gone() == [b"child"]
    assert fronts.take_gone() == []
    assert fronts.attached == [b"mine"]
    child.wait()
    mine.close()
    other.close()


def test_attach_and_detach(server: ControlServer) -> None:
    fronts, front = FrontEnds(server), client(server, "front")
    for pid in (0, -1, 1 << 22, 1 << 40, 1 << 63):
        front.send(m.Attach(pid=pid))
    front.send(m.Shutdown())
    front.send(m.AbortRequest(id="a"))
    received: list[m.Message] = []
    wait_until(lambda: received.extend(message for _, message in turn(server, fronts)) or received, "the abort comes")
    assert received == [m.AbortRequest(id="a")]
    refused = [front.receive(DEADLINE) for _ in range(6)]
    assert all(isinstance(each, m.Refused) for each in refused)
    assert "no process" in refused[0].reason
    assert "no message of a front end" in refused[5].reason
    assert fronts.attached == []
    for message in (m.Attach(pid=os.getpid()), m.Attach(pid=1), m.Detach(), m.Detach(), m.Attach(pid=os.getpid())):
        front.send(message)
    received.clear()
    wait_until(lambda: received.extend(each for _, each in turn(server, fronts)) or len(received) == 5, "all come")
    assert fronts.attached == [b"front"]
    assert fronts.take_gone() == [b"front"]
    front.close()


def test_a_front_end_that_does_not_read_blocks_nothing(server: ControlServer) -> None:
    """And gets all when it reads again."""
    fronts, count = FrontEnds(server), 3000
    with zmq.Context() as context, context.socket(zmq.DEALER) as lazy:
        lazy.setsockopt(zmq.RCVHWM, 1)
        lazy.setsockopt(zmq.RCVBUF, 4096)
        lazy.setsockopt(zmq.IDENTITY, b"lazy")
        lazy.connect(server.endpoints.front)
        lazy.send(b"\xff")
        wait_until(lambda: turn(server, fronts) == [] and lazy.poll(0), "it is refused")
        for number in range(count):
            fronts.answer(b"lazy", m.Outputs(outputs=[TokenOutput(id=str(number), token_ids=[number] * 1000)]))
            fronts.answer(b"unknown", m.EngineDead(reason=""))
        frames = [lazy.recv() for _ in range(1 + count)]
        assert len(frames) == 1 + count
        lazy.close(linger=0)


# --- ids --------------------------------------------------------------------------------------------------------------


def test_outputs_go_back_with_the_ids_that_front_ends_chose() -> None:
    """Whatever the ids look like."""
    ids = SequenceIds()
    sent = [(b"front", "1/0"), (b"other", "1/0"), (b"front", "0:1/0"), (b"", ""), (b"other", ":")]
    outputs = [TokenOutput(id=ids.add(front, own) or "", token_ids=[index]) for index, (front, own) in enumerate(sent)]
    assert len({output.id for output in outputs}) == len(sent)
    found = ids.by_front(outputs)
    assert [(front, output.id) for front in found for output in found[front]] == [
        *((b"front", "1/0"), (b"front", "0:1/0"), (b"other", "1/0"), (b"other", ":"), (b"", "")),
    ]
    assert [output.token_ids for output in found[b"other"]] == [[1], [4]]


def test_an_id_is_in_use_until_its_sequence_is_finished() -> None:
    ids = SequenceIds()
    name = ids.add(b"front", "a")
    assert name is not None
    assert ids.add(b"front", "a") is None
    assert (ids.find(b"front", "a"), ids.find(b"other", "a"), ids.find(b"front", "b")) == (name, None, None)
    ids.by_front([TokenOutput(id=name, token_ids=[1])])
    assert ids.add(b"front", "a") is None
    ids.by_front([TokenOutput(id=name, token_ids=[], finish_reason="length")])
    assert ids.find(b"front", "a") is None
    assert ids.add(b"front", "a") is not None


def test_a_front_end_that_has_gone_is_forgotten() -> None:
    """Also where another one has taken its identity."""
    ids = SequenceIds()
    names = [ids.add(b"front", "a"), ids.add(b"front", "b")]
    other = ids.add(b"other", "a")
    assert ids.forget(b"front") == names
    assert ids.forget(b"front") == []
    again = ids.add(b"front", "a")
    assert again not in names
    late = [TokenOutput(id=name or "", token_ids=[n], finish_reason="abort") for n, name in enumerate(names)]
    found = ids.by_front(
        [*late, TokenOutput(id=other or "", token_ids=[7]), TokenOutput(id=again or "", token_ids=[8])]
    )
    assert {front: [each.token_ids for each in found[front]] for front in found} == {b"other": [[7]], b"front": [[8]]}


# --- questions --------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_last_question() -> None:
    """A second question while ranks still answer the first one, as at the end of a run with a trace."""
    collector = StatsCollector(2)
    assert collector.ask(b"front")
    collector.begin()
    assert not collector.ask(b"other"), "one question serves both"
    assert collector.on_stats(RankStats(rank=0, attention_seconds=1.0)) is None
    collector.begin()
    assert collector.on_stats(RankStats(rank=1)) is None, "to the first question"
    assert collector.on_stats(RankStats(rank=1)) is None
    found = collector.on_stats(RankStats(rank=0, attention_seconds=2.0))
    assert found is not None
    assert (sorted(found), found[0].attention_seconds, collector.num_missing) == ([0, 1], 2.0, 0)
    assert collector.take_asking() == {b"front", b"other"}
    assert collector.take_asking() == set()
