"""What happens to a request whose client goes away, and to one whose engine fails, before and after the first byte."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI

from tests.server.stand_in import TEMPLATE, StandIn, app_of, events, post

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hello", "max_tokens": 900},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 900},
}


class Connection:
    """An ASGI connection whose client may go away."""

    def __init__(self, app: FastAPI, path: str, body: Any) -> None:
        self._content = json.dumps(body).encode()
        self._is_sent = False
        self._gone = asyncio.Event()
        self.parts: list[bytes] = []
        self.has_part = asyncio.Event()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self._content))]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("server", 80),
            "client": ("client", 1),
            "headers": headers,
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    def go_away(self) -> None:
        self._gone.set()

    async def _receive(self) -> Any:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self._content, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.parts.append(message["body"])
            self.has_part.set()


def tasks() -> set[Any]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def until(condition: Callable[[], bool]) -> None:
    """Lets other tasks run until the condition holds; the test fails if it never does."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_queued", [False, True])
@pytest.mark.parametrize("extra", [{}, {"n": 3}])
def test_a_client_that_goes_away_ends_its_sequences(
    path: str, stream: bool, is_queued: bool, extra: dict[str, Any]
) -> None:
    async def run() -> None:
        llm = StandIn()
        app = app_of(llm, chat_template=TEMPLATE)
        if is_queued:
            llm.may_run.clear()
        connection = Connection(app, path, BODIES[path] | extra | {"stream": stream})
        await until(lambda: llm.num_running == 1)
        assert app.state.server.admission.num_sequences == extra.get("n", 1)
        if stream and not is_queued:
            await connection.has_part.wait()
        assert not llm.aborted
        connection.go_away()
        await connection.task
        assert [request.num_completions for request in llm.aborted] == [extra.get("n", 1)]
        assert llm.num_running == app.state.server.admission.num_sequences == 0
        assert not tasks()
        assert not any(b"DONE" in part for part in connection.parts)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_all_prompts_of_a_client_that_goes_away_end(stream: bool) -> None:
    async def run() -> None:
        llm = StandIn()
        app = app_of(llm)
        connection = Connection(app, COMPLETIONS, {"prompt": ["a"] * 8, "max_tokens": 900, "stream": stream})
        await until(lambda: llm.num_running == 8)
        connection.go_away()
        await connection.task
        assert len(llm.aborted) == 8
        assert llm.num_running == app.state.server.admission.num_sequences == 0
        assert not tasks()

    asyncio.run(run())


def test_a_server_that_stops_ends_its_requests() -> None:
    async def run() -> None:
        llm = StandIn()
        connection = Connection(app_of(llm), COMPLETIONS, BODIES[COMPLETIONS])
        await until(lambda: llm.num_running == 1)
        connection.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connection.task
        assert len(llm.aborted) == 1
        assert not tasks()

    asyncio.run(run())


def test_nothing_is_sent_before_the_first_token() -> None:
    async def run() -> None:
        llm = StandIn()
        llm.may_run.clear()
        connection = Connection(app_of(llm), COMPLETIONS, BODIES[COMPLETIONS] | {"stream": True, "max_tokens": 2})
        await until(lambda: llm.num_running == 1)
        await asyncio.sleep(0)
        assert not connection.parts
        llm.may_run.set()
        await connection.task
        assert len(connection.parts) == 3  # two tokens and the end

    asyncio.run(run())


def test_the_queue_is_bounded() -> None:
    async def run() -> None:
        llm = StandIn(max_num_seqs=2)
        llm.may_run.clear()
        app = app_of(llm, max_queued_requests=1)
        connections = [Connection(app, COMPLETIONS, BODIES[COMPLETIONS]) for _ in range(3)]
        await until(lambda: llm.num_running == 3)
        refused = Connection(app, COMPLETIONS, BODIES[COMPLETIONS])
        await refused.task
        assert json.loads(b"".join(refused.parts))["error"]["code"] == "service_unavailable"
        for connection in connections:
            connection.go_away()
            await connection.task

    asyncio.run(run())


# --- failures of the engine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        ({"fails_after": 0}, 503, "engine_dead"),
        ({"errors_after": 0}, 500, "generation_failed"),
        ({"errors_after": 0, "refuses": True}, 400, "generation_failed"),
        ({"panics": True}, 500, "internal_error"),
    ],
)
def test_a_failure_before_the_first_byte(
    path: str, stream: bool, failure: dict[str, Any], status: int, code: str
) -> None:
    llm = failing(failure)
    response = post(app_of(llm, chat_template=TEMPLATE), path, BODIES[path] | {"stream": stream})
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert "rank 0" not in error["message"]
    assert llm.num_running == 0


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("extra", [{}, {"n": 2}])
@pytest.mark.parametrize(
    ("failure", "code"), [({"fails_after": 3}, "engine_dead"), ({"errors_after": 3}, "generation_failed")]
)
def test_a_failure_after_the_first_byte_is_an_event(
    path: str, extra: dict[str, Any], failure: dict[str, Any], code: str
) -> None:
    llm = failing(failure)
    response = post(app_of(llm, chat_template=TEMPLATE), path, BODIES[path] | extra | {"stream": True})
    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert len(chunks) == 3 * extra.get("n", 1)
    assert last["error"]["code"] == code
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    whole = post(app_of(failing(failure), chat_template=TEMPLATE), path, BODIES[path] | extra)
    assert whole.status_code == (503 if code == "engine_dead" else 500)
    assert whole.json() == {"error": last["error"]}


def test_one_prompt_of_several_fails() -> None:
    llm = failing({"errors_after": 2})
    *chunks, last = events(post(app_of(llm), COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 9, "stream": True}).text)
    assert last["error"]["code"] == "generation_failed"
    assert len(chunks) == 4
    assert llm.num_running == 0


def failing(failure: dict[str, Any]) -> StandIn:
    llm = StandIn()
    for name, value in failure.items():
        setattr(llm, name, value)
    return llm


@pytest.mark.parametrize(
    ("state", "code"), [({"is_ready": False}, 503), ({"dead_reason": "rank 1 was killed, see /tmp/x"}, 503)]
)
def test_an_engine_that_cannot_serve(state: dict[str, Any], code: int) -> None:
    response = post(app_of(failing(state)), COMPLETIONS, BODIES[COMPLETIONS])
    assert response.status_code == code
    assert response.headers["retry-after"]
    assert "/tmp" not in response.text


@pytest.mark.parametrize("path", BODIES)
def test_what_the_server_aborts_ends_with_that_reason(path: str) -> None:
    app = app_of(failing({"is_aborting": True}), chat_template=TEMPLATE)
    done = post(app, path, BODIES[path] | {"n": 2}).json()
    assert [choice["finish_reason"] for choice in done["choices"]] == ["abort"] * 2
    chunks = events(post(app, path, BODIES[path] | {"n": 2, "stream": True}).text)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == ["abort"] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_was_aborted_before_it_was_scored(stream: bool) -> None:
    app = app_of(failing({"is_aborting": True}))
    response = post(app, COMPLETIONS, {"prompt": "Hello", "n": 2, "echo": True, "logprobs": 1, "stream": stream})
    choices = [c for chunk in events(response.text) for c in chunk["choices"]] if stream else response.json()["choices"]
    assert sorted(choice["index"] for choice in choices) == [0, 1]
    for choice in choices:
        assert choice["text"] == "Hello"
        assert set(choice["logprobs"]["token_logprobs"]) == {None}


# --- what is counted --------------------------------------------------------------------------------------------------


class Meter:
    def __init__(self) -> None:
        self.num_tokens, self.reason = 0, ""

    def on_piece(self, piece: Any) -> None:
        self.num_tokens += len(piece.token_ids)

    def finish(self, reason: str) -> None:
        assert not self.reason
        self.reason = reason


class Counting:
    """Stands for metrics and for traces."""

    def __init__(self) -> None:
        self.meters: list[Meter] = []
        self.finished: list[Meter] = []

    def begin(self, *arguments: Any) -> Any:
        if len(arguments) == 2:
            self.meters.append(Meter())
            return self.meters[-1]
        return self

    def finish(self, meter: Meter) -> None:
        self.finished.append(meter)


def counted(llm: StandIn, act: Callable[[FastAPI], Awaitable[Any]]) -> Counting:
    async def run() -> Counting:
        app = app_of(llm)
        app.state.server.metrics = app.state.server.tracing = counting = Counting()
        await act(app)
        return counting

    return asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_every_prompt_is_counted_once(stream: bool) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 5, "stream": stream}
    counting = counted(StandIn(), lambda app: Connection(app, COMPLETIONS, body).task)
    assert [(meter.num_tokens, meter.reason) for meter in counting.meters] == [(10, "length")] * 2
    assert counting.finished == counting.meters


def test_what_is_cut_counts_as_aborted() -> None:
    async def act(app: FastAPI) -> None:
        connection = Connection(app, COMPLETIONS, BODIES[COMPLETIONS] | {"stream": True})
        await connection.has_part.wait()
        connection.go_away()
        await connection.task

    counting = counted(StandIn(), act)
    assert [meter.reason for meter in counting.meters] == ["abort"]


def test_a_failure_is_counted() -> None:
    counting = counted(failing({"errors_after": 2}), lambda app: Connection(app, COMPLETIONS, BODIES[COMPLETIONS]).task)
    assert [meter.reason for meter in counting.meters] == ["error"]
