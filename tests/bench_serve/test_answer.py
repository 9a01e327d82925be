"""What counts as a chunk, and how a response fails. Stamps are given, so that no clock is read."""

import json
from typing import Any

import pytest

from hetis.bench_serve.answer import Answer


def event(**fields: Any) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


def text(value: str | None, **more: Any) -> bytes:
    return event(choices=[{"index": 0, "text": value}], **more)


def delta(**fields: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": fields}])


def usage(prompt: int | None, completion: int | None) -> dict[str, int | None]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0}


DONE = b"data: [DONE]\n\n"


def answer_to(*parts: tuple[float, bytes], status: int = 200, is_whole: bool = True) -> Answer:
    """The answer to a request that was due at 10 s and sent at 10.5 s. `parts`: (stamp, bytes)."""
    answer = Answer(5, 10.0)
    answer.start, answer.status = 10.5, status
    for stamp, data in parts:
        answer.on_body(data, stamp)
    answer.finish(is_whole)
    return answer


def test_times_are_those_of_chunks_with_choices() -> None:
    answer = answer_to(
        (10.6, b": ping\n\n"),
        (11.0, text("a")),
        (11.25, text("")),
        (11.75, text("b")),
        (12.0, event(choices=[], usage=usage(7, 4)) + DONE),
    )
    assert answer.failure is None
    assert (answer.ttft, answer.latency, answer.queue_time) == (0.5, 1.25, 0.5)
    assert answer.intervals == [0.25, 0.5]
    assert (answer.prompt_len, answer.output_tokens, "".join(answer.texts)) == (7, 4, "ab")


def test_chunks_of_one_read_have_its_stamp() -> None:
    answer = answer_to((11.0, text("a") + text("b")), (11.5, text("c") + DONE))
    assert (answer.ttft, answer.intervals) == (0.5, [0.0, 0.5])


def test_without_usage_chunks_count_as_tokens() -> None:
    answer = answer_to((11.0, text("a")), (11.5, text("b") + event(choices=[], usage=usage(None, None)) + DONE))
    assert (answer.num_tokens, answer.output_tokens, answer.prompt_len) == (None, 2, 5)


def test_usage_beside_choices_counts_as_both() -> None:
    answer = answer_to((11.0, text("a", usage=usage(6, 1))), (12.0, text("bc", usage=usage(6, 3)) + DONE))
    assert (answer.output_tokens, answer.prompt_len, answer.intervals) == (3, 6, [1.0])


def test_a_chat_whose_first_chunk_has_no_text_is_noticed() -> None:
    silent = answer_to((11.0, delta(role="assistant")), (12.0, delta(content="a") + DONE))
    spoken = answer_to((11.0, delta(role="assistant", content="a") + DONE))
    assert (silent.first_is_empty, silent.ttft, "".join(silent.texts)) == (True, 0.5, "a")
    assert not spoken.first_is_empty


@pytest.mark.parametrize(
    ("parts", "status", "is_whole", "kind", "message"),
    [
        ([b'{"error": {"message": "too\\nlong"}}'], 400, True, "HTTP 400", "too long"),
        ([b'{"det', b'ail": "gone"}'], 404, True, "HTTP 404", "gone"),
        ([b"<h1>Bad  Gateway</h1>"], 502, True, "HTTP 502", "<h1>Bad Gateway</h1>"),
        ([b"\xff"], 500, True, "HTTP 500", "\ufffd"),
        ([], 503, True, "HTTP 503", ""),
        ([text("a"), b"data: {x\n\n"], 200, True, "malformed response", "is not a chunk"),
        ([b"data: \xff\n\n"], 200, True, "malformed response", "is not a chunk"),
        ([event(choices=[{"text": 7}])], 200, True, "malformed response", "is not a chunk"),
        ([text("a"), event(error={"message": "engine died"}), DONE], 200, True, "error in the stream", "engine died"),
        ([event(error="overloaded")], 200, True, "error in the stream", "overloaded"),
        ([event(choices=[], usage=usage(3, 0)), DONE], 200, True, "no output", "without a chunk"),
        ([text("a")], 200, False, "connection closed early", "without [DONE]"),
    ],
)
def test_failures(parts: list[bytes], status: int, is_whole: bool, kind: str, message: str) -> None:
    answer = answer_to(*((11.0, part) for part in parts), status=status, is_whole=is_whole)
    assert answer.failure is not None
    assert answer.failure.kind == kind
    assert message in answer.failure.message
    assert answer.output_tokens == 0


def test_a_body_that_ends_with_its_connection_is_whole_after_done() -> None:
    assert answer_to((11.0, text("a") + DONE), is_whole=False).failure is None


def test_an_answer_counts_from_the_start_of_its_run() -> None:
    answer = answer_to((11.0, text("a")), (12.0, text("b") + DONE))
    answer.count_from(10.0)
    assert (answer.due, answer.start, answer.first, answer.last) == (0.0, 0.5, 1.0, 2.0)
    assert (answer.ttft, answer.latency) == (0.5, 1.5)
