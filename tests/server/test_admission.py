"""Which requests may enter: by the state of the server, and by the room in the queue."""

import asyncio

import pytest
from starlette.types import Message

from hetis.core.messages import EngineStatus
from hetis.server.admission import Admission
from hetis.server.errors import ApiError
from tests.server.quiet_engine import frame, http_client


class Book:
    def __init__(self, max_num_seqs: int, max_queued: int | None) -> None:
        self.status: EngineStatus | None = None
        self.admission = Admission(max_num_seqs, max_queued, lambda: "ready", lambda: self.status)

    def refusal(self, num_sequences: int = 1) -> ApiError | None:
        try:
            with self.admission.admit(num_sequences):
                return None
        except ApiError as error:
            return error


def test_as_many_sequences_enter_as_run_and_wait() -> None:
    book = Book(4, 3)
    with book.admission.admit(4), book.admission.admit(2):
        assert book.admission.num_waiting == 2
        assert book.refusal(1) is None
        error = book.refusal(2)
        assert error is not None
        assert (error.status, error.headers) == (503, {"Retry-After": "1"})
        assert not book.admission.has_room(2)
    assert book.admission.num_sequences == 0
    assert book.refusal(7) is None


def test_what_never_fits_is_a_bad_request() -> None:
    error = Book(4, 3).refusal(8)
    assert error is not None
    assert (error.status, error.param) == (400, "n")


def test_the_default_queue_is_four_times_what_runs() -> None:
    assert Book(64, None).admission.max_queued == 256


def test_where_memory_is_short_the_queue_is_not_longer() -> None:
    """The engine runs 2 of 4 sequences for lack of pages: 2 + 3 may be there."""
    book = Book(4, 3)
    book.status = EngineStatus(num_running=2, num_waiting=1)
    with book.admission.admit(5):
        assert book.refusal(1) is not None
        assert book.admission.num_waiting == 3
        book.status = EngineStatus(num_running=4)
        assert book.refusal(1) is None


def test_a_request_that_fails_frees_its_place() -> None:
    book = Book(1, 0)
    with pytest.raises(KeyError), book.admission.admit(1):
        raise KeyError
    assert book.refusal() is None


@pytest.mark.parametrize(
    ("state", "word", "retry"), [("starting", "loaded", "5"), ("draining", "shutting", "10"), ("dead", "engine", "10")]
)
def test_requests_for_the_model_wait_until_the_server_is_ready(state: str, word: str, retry: str) -> None:
    engine, app, server = frame()
    engine.is_ready, engine.dead_reason = state != "starting", "rank 1 was killed" if state == "dead" else None
    server.is_draining = state == "draining"

    async def check() -> None:
        async with http_client(app) as client:
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
                found = await client.post(path, json={})
                assert (found.status_code, found.headers["retry-after"]) == (503, retry)
                assert word in found.json()["error"]["message"]
                assert "rank" not in found.text
            assert ((await client.get("/v1/models")).status_code == 503) == (state == "starting")
            assert (await client.get("/version")).status_code == 200
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/readyz")).json() == {"status": state}

    asyncio.run(check())
    with pytest.raises(ApiError, match=word), server.admission.admit(1):
        pass


def test_a_full_queue_is_not_ready() -> None:
    _, app, server = frame(max_queued_requests=0)

    async def status() -> tuple[int, str]:
        async with http_client(app) as client:
            found = await client.get("/readyz")
            return found.status_code, found.json()["status"]

    with server.admission.admit(64):
        assert asyncio.run(status()) == (503, "queue full")
    assert asyncio.run(status()) == (200, "ready")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_full_queue_refuses_before_the_body_is_read(path: str) -> None:
    """What needs no sequence is still served; the metrics name the route."""
    _, app, server = frame(max_queued_requests=0)
    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"", "headers": [(b"content-length", b"9")]
    }  # fmt: skip
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body is read")

    async def send(message: Message) -> None:
        sent.append(message)

    async def check() -> None:
        await app(scope, receive, send)
        assert sent[0]["status"] == 503
        assert (b"retry-after", b"1") in sent[0]["headers"]
        async with http_client(app) as client:
            assert (await client.post("/tokenize", json={"prompt": "It"})).status_code != 503
        labels = {"handler": path, "method": "POST", "status": "503"}
        assert server.metrics.registry.get_sample_value("http_requests_total", labels) == 1

    with server.admission.admit(64):
        asyncio.run(check())
