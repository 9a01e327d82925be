"""The control plane over real sockets."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from hetis.comm.control import ControlClient, ControlServer
from hetis.core import messages as m
from tests.comm.control_helpers import take
from tests.processes.look import DEADLINE, wait_until


@pytest.fixture(params=[None, "127.0.0.1"])
def server(request: pytest.FixtureRequest, directory: Path) -> Iterator[ControlServer]:
    """On unix sockets, and on TCP."""
    server = ControlServer(str(directory), request.param)
    yield server
    server.close()


def test_messages_go_both_ways_in_order(server: ControlServer) -> None:
    client = ControlClient(server.endpoints.ranks, "3", "ranks")
    for step in range(100):
        client.send(m.StepResult(step=step, tokens=[0] * 10))
    assert [take(server, "ranks")[1].step for _ in range(100)] == list(range(100))
    for _ in range(3):
        server.send("ranks", b"3", m.StatsQuery())
    server.send("ranks", b"3", m.Shutdown())
    assert [type(client.receive(DEADLINE)) for _ in range(4)] == [m.StatsQuery] * 3 + [m.Shutdown]
    assert client.receive(0) is None
    client.close()


def test_garbage_is_dropped(server: ControlServer) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(server.endpoints.ranks)
        for frames in ([b""], [b"\xff\xfe"], [b"a", b"b", b"c"], [b"\x81\xa4type\xa6Attach"]):
            stranger.send_multipart(frames)
        client = ControlClient(server.endpoints.ranks, "1", "ranks")
        client.send(m.Ready(rank=1))
        assert take(server, "ranks") == (b"1", m.Ready(rank=1))
        client.close()
        stranger.close(linger=0)


def test_a_front_end_is_refused_what_is_no_message(server: ControlServer) -> None:
    front = ControlClient(server.endpoints.front, "front", "front")
    front.send(m.Shutdown())  # only the root ends a fleet
    front.socket.send(b"\xff\xfe")
    front.send(m.Attach(pid=1))
    assert take(server, "front") == (b"front", m.Attach(pid=1)), "the driver goes on"
    for word in ("Shutdown", ""):
        answer = front.receive(DEADLINE)
        assert isinstance(answer, m.Refused)
        assert word in answer.reason
    front.close()


def test_a_lost_driver_is_noticed_at_once(directory: Path) -> None:
    server = ControlServer(str(directory), None)
    client = ControlClient(server.endpoints.ranks, "1", "ranks")
    assert not client.is_lost, "not connected is not lost"
    client.send(m.Ready(rank=1))
    take(server, "ranks")
    assert not client.is_lost
    server.close()
    wait_until(lambda: client.is_lost, "the loss is noticed")
    client.close(linger=0)
