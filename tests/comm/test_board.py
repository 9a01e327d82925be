"""Values that ranks publish reach the ranks that look them up, before and after."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hetis.comm.board import Board, BoardRendezvous
from hetis.comm.control import ControlServer
from hetis.core.messages import LookUp, Publish, Published
from tests.comm.comm_helpers import together


@pytest.fixture
def server(directory: Path) -> Iterator[ControlServer]:
    """With a thread that keeps the board, like the driver."""
    server, board, is_over = ControlServer(str(directory), None), Board(), threading.Event()

    def keep() -> None:
        while not is_over.is_set():
            server.poller.poll(10)
            while (received := server.receive("board")) is not None:
                for rank, published in board.answer(*received):
                    server.send("board", rank, published)

    thread = threading.Thread(target=keep)
    thread.start()
    yield server
    is_over.set()
    thread.join()
    server.close()


def rank(server: ControlServer, number: int) -> BoardRendezvous:
    return BoardRendezvous(server.endpoints.board, number, lambda: f"store of {number}")


def test_values_reach_ranks_that_wait_and_ranks_that_come_later(server: ControlServer) -> None:
    value = bytes(range(256))
    first, second, third = (rank(server, number) for number in range(3))

    def publish() -> bytes:
        first.set("link/0-1", value)
        return first.get("link/0-1")

    assert together(publish, lambda: second.get("link/0-1"), lambda: second.store) == [value, value, "store of 1"]
    assert third.get("link/0-1", 5.0) == value
    assert third.get("link/0-1", 0.0) == value, "known, so nothing is asked"
    for each in (first, second, third):
        each.close()


def test_answers_that_come_too_late_are_not_taken_for_others(server: ControlServer) -> None:
    first, second = rank(server, 0), rank(server, 1)
    with pytest.raises(TimeoutError, match=r"'a' .* 0\.01 s"):
        first.get("a", 0.01)
    second.set("a", b"1")
    second.set("b", b"2")
    assert first.get("b", 5.0) == b"2"
    assert first.get("a", 5.0) == b"1"
    for each in (first, second):
        each.close()


def test_each_rank_is_answered_once_for_each_question() -> None:
    board = Board()
    for asking in (b"1", b"2", b"1"):
        assert list(board.answer(asking, LookUp(key="k"))) == []
    published = Published(key="k", value=b"v")
    answers = board.answer(b"0", Publish(key="k", value=b"v"))
    assert list(answers) == [(b"1", published), (b"2", published), (b"1", published)]
    assert list(board.answer(b"3", LookUp(key="k"))) == [(b"3", published)]
