"""The event parser at every position where a read can end."""

import pytest

from hetis.bench_serve.sse import EventParser

EVENTS = [b'{"a": 1}', b"two\nlines", "ä€".encode(), b"[DONE]"]
FIRST = ': ping\n\nevent: message\nid: 7\ndata: {"a": 1}\n\n:\n\n\n'
STREAM = f"{FIRST}data: two\ndata:lines\nretry: 5\n\ndata: ä€\n\ndata: [DONE]\n\n"


def parse(parts: list[bytes]) -> list[bytes]:
    parser = EventParser()
    return [event for part in parts for event in parser.feed(part)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_stream_may_be_cut_anywhere(end: str) -> None:
    # a CR at the very end may be half of a CRLF: the comment after it shows that it was whole
    stream = (STREAM.replace("\n", end) + ":").encode()
    assert parse([stream]) == EVENTS
    for first in range(len(stream) + 1):
        assert parse([stream[:first], stream[first:]]) == EVENTS, first
        for second in range(first, len(stream) + 1, 7):
            assert parse([stream[:first], stream[first:second], stream[second:]]) == EVENTS, (first, second)
    assert parse([bytes([byte]) for byte in stream]) == EVENTS


def test_an_event_counts_with_the_read_that_ends_it() -> None:
    parser = EventParser()
    assert parser.feed(b"data: 1\n\ndata: 2\n") == [b"1"]
    assert parser.feed(b"") == []
    assert parser.feed(b"\ndata: 3\r\n\r") == [b"2"]
    assert parser.feed(b"\n") == [b"3"]


def test_only_one_space_is_removed_and_other_fields_are_ignored() -> None:
    assert parse([b"data:  x \ndatabase: 1\ndata\n\nevent: y\n\n"]) == [b" x \n"]
