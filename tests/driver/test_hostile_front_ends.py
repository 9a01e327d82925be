"""Whatever front ends send, in whatever order and phase: an answer, never an end, and no pages stay in use."""

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetis.comm.control import MAX_FRONT_BYTES, ControlServer, encode
from hetis.core import messages as m
from hetis.core.device_info import RankStats
from hetis.core.sampling_params import SamplingParams
from tests.driver.scripted import END, FRONT, OTHER_FRONT, Script, Sockets, run
from tests.processes.look import DEADLINE, wait_until

# --- frames -----------------------------------------------------------------------------------------------------------

VALID = [
    m.Attach(pid=os.getpid()),
    m.Detach(),
    m.AddRequest(id="a", token_ids=[1, 2, 300], prompt_len=2, seed=-5, params=SamplingParams(stop="x", seed=3)),
    m.AbortRequest(id="a"),
    m.FleetQuery(),
    m.ProfileQuery(),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message with some bytes changed, added or missing."""
    payload = bytearray(encode(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(payload) - 1))
        payload[position : position + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
        payload = payload or bytearray(b"\0")
    return bytes(payload)


NESTED = [b"\x91" * 100_000, b"\x82\xa4type\xa6Attach\xa3pid" + b"\x81\xa1x" * 100_000, b"\xdd\xff\xff\xff\xff\x01"]
FRAMES = st.lists(st.binary(max_size=40) | damaged() | st.sampled_from(NESTED), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def plumbing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ControlServer, "zmq.Socket[bytes]"]]:
    """The driver's sockets, and a front end's without a codec."""
    server = ControlServer(str(tmp_path_factory.mktemp("s")), None)
    with zmq.Context() as context, context.socket(zmq.DEALER) as front:
        front.setsockopt(zmq.RCVTIMEO, int(1000 * DEADLINE))
        front.connect(server.endpoints.front)
        yield server, front
        front.close(linger=0)
    server.close()


@given(st.lists(FRAMES, max_size=5))
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_frames_that_are_no_message_are_refused_one_by_one(
    plumbing: tuple[ControlServer, "zmq.Socket[bytes]"], batch: list[list[bytes]]
) -> None:
    server, front = plumbing
    last = m.AbortRequest(id="the last one")
    for frames in batch:
        front.send_multipart(frames)
    front.send(encode(last))
    received: list[m.Message] = []
    while last not in received:
        server.poller.poll(50)
        while (one := server.receive("front")) is not None:
            received.append(one[1])
    num_refused = len(batch) + 1 - len(received)
    answers = [msgspec.msgpack.decode(front.recv()) for _ in range(num_refused)]
    assert {answer["type"] for answer in answers} <= {"Refused"}
    assert not front.poll(0)


def test_a_huge_frame_is_refused(plumbing: tuple[ControlServer, "zmq.Socket[bytes]"]) -> None:
    server, front = plumbing
    front.send(b"\x01" * (MAX_FRONT_BYTES + 1))
    wait_until(lambda: server.receive("front") is None and front.poll(50), "it is answered")
    assert f"more than {MAX_FRONT_BYTES}" in msgspec.msgpack.decode(front.recv())["reason"]


# --- messages ---------------------------------------------------------------------------------------------------------

IDS = st.sampled_from(["a", "b", "0:a", ""])
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([None, 1, 2, 5, 2**62]),
    n=st.sampled_from([1, 3]),
    stop_token_ids=st.sampled_from([[], [7], [511], [512], [2**31 - 1]]),
    logprobs=st.sampled_from([None, -1, 3, 2**62]),
    prompt_logprobs=st.sampled_from([None, 2]),
)
TOKENS = st.lists(st.sampled_from([0, 7, 511, 512, -1, 2**40]), max_size=4) | st.sampled_from([[5] * 63, [5] * 100_000])
NUMBERS = st.sampled_from([0, 1, 2, 3, -1, 64, 2**31, 2**63 - 1, -(2**63), 2**64 - 1])
MESSAGES = st.one_of(
    st.builds(m.Attach, pid=st.sampled_from([os.getpid(), 1, 0, -1, 2**22, 2**63 - 1])),
    st.just(m.Attach(pid=os.getpid())),
    st.just(m.Detach()),
    st.builds(m.AddRequest, id=IDS, token_ids=TOKENS, prompt_len=NUMBERS, seed=NUMBERS, params=PARAMS),
    st.builds(
        m.AddRequest,
        id=IDS,
        token_ids=st.just([1, 2, 5]),
        prompt_len=st.just(2),
        seed=st.just(0),
        params=st.just(SamplingParams(max_tokens=4)),
    ),
    st.builds(m.AbortRequest, id=IDS),
    st.just(m.FleetQuery()),
    st.just(m.ProfileQuery()),
)
TURNS = st.lists(st.lists(st.tuples(st.sampled_from([FRONT, OTHER_FRONT]), MESSAGES), max_size=5), max_size=8)


@given(TURNS, TURNS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_any_messages_in_any_phase(
    sockets: Sockets,
    early: list[list[tuple[bytes, m.Message]]],
    late: list[list[tuple[bytes, m.Message]]],
) -> None:
    """Requests are answered once with their end, or go on until the front end detaches; then all pages are free."""
    alone = Sockets(sockets.directory)
    run(alone, story(alone, early, late))


def story(sockets: Sockets, early: list[Any], late: list[Any]) -> Script:
    for turn in early:
        put(sockets, turn)
        yield None
    for join in (sockets.hello, sockets.ready):
        join(0)
        join(1)
        yield None
    answer_ranks(sockets)
    for turn in late:
        put(sockets, turn)
        yield None
        answer_ranks(sockets)
    put(sockets, [(front, m.Detach()) for front in (FRONT, OTHER_FRONT)])
    yield None
    while answer_ranks(sockets):  # steps in flight
        yield None
    sockets.take("front", FRONT)
    sockets.put("front", FRONT, m.FleetQuery())
    yield None
    answer_ranks(sockets)
    yield None
    [stats] = sockets.take("front", FRONT)
    assert [member.pages_used for member in stats.members] == [0, 0]
    yield END


def put(sockets: Sockets, turn: list[tuple[bytes, m.Message]]) -> None:
    for front, message in turn:
        sockets.put("front", front, msgspec.structs.replace(message))  # the driver changes ids


def answer_ranks(sockets: Sockets) -> int:
    """Answers all that ranks have been sent; how many messages these were."""
    sent = sockets.take("ranks", b"0")
    assert sent == sockets.take("ranks", b"1")
    for message in sent:
        if isinstance(message, m.StepCommand):
            sockets.answer(message)
        elif isinstance(message, m.StatsQuery):
            for rank in (0, 1):
                sockets.put("ranks", str(rank).encode(), m.Stats(stats=RankStats(rank=rank)))
    return len(sent)
