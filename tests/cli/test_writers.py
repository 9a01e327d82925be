"""Writers of `hetis generate`: the text itself, lines of several texts, JSON."""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from hetis.cli.writers import JsonWriter, LineWriter, TextWriter, make_writer
from hetis.frontend.requests import Piece


def pieces_of(texts: Sequence[str], size: int = 1) -> Iterator[Piece]:
    """Pieces of several texts in turn, of `size` characters; the last piece of a text finishes it."""
    for start in range(0, max(map(len, texts)) + size, size):
        for index, text in enumerate(texts):
            if start < len(text) + size:
                is_last = start >= len(text)
                ids = [ord(character) for character in text[start : start + size]]
                yield Piece(index, 0, text[start : start + size], ids, finish_reason="length" if is_last else None)


def written(writer: Any, pieces: Iterator[Piece], capsys: pytest.CaptureFixture[str]) -> str:
    """Standard output after all pieces."""
    for piece in pieces:
        writer.add(piece)
    writer.close()
    return capsys.readouterr().out


AWKWARD = "\n\n  a long line " + "word " * 60 + "\n\n\ttab\r\nend \x0b\u2028 日本"


@pytest.mark.parametrize("text", [AWKWARD, "", "\n", "no newline", "newline\n"])
def test_one_text_is_written_unchanged(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert written(TextWriter("", ends_line=False), pieces_of([text]), capsys) == text
    assert written(TextWriter("It ", ends_line=False), pieces_of([text]), capsys) == f"It {text}"
    on_terminal = written(TextWriter("It ", ends_line=True), pieces_of([text]), capsys)
    assert on_terminal == f"It {text}" + ("" if text.endswith("\n") else "\n")


def test_one_text_is_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    writer = TextWriter("", ends_line=False)
    for piece in pieces_of(["some text"]):
        writer.add(piece)
        assert capsys.readouterr().out == piece.text, "each piece at once"


def test_lines_of_several_texts_are_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["first\n\n" + "word " * 60, AWKWARD, ""]
    lines = written(LineWriter(["", "b", ""], None), pieces_of(texts, 3), capsys).split("\n")
    assert lines.pop() == ""
    for index, text in enumerate(("", "b", "")):
        own = [line[4:] for line in lines if line.startswith(f"[{index}]")]
        expected = (text + texts[index]).split("\n")
        assert own == [line.rstrip() for line in expected if line or line is not expected[-1]]


def test_lines_break_at_words_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = "word " * 50 + "\n\n" + "x" * 150
    lines = written(LineWriter(["a", "b"], 100), pieces_of(["", text]), capsys).splitlines()
    assert lines.count("[0] a") == 1
    own = [line for line in lines if line.startswith("[1]")]
    assert len(own) == len(lines) - 1
    assert all(len(line) <= 100 for line in own)
    assert "[1]" in own, "blank lines are kept"
    words = " ".join(line.removeprefix("[1]") for line in own).split()
    assert words == ["bword", *["word"] * 49, "x" * 96, "x" * 54]


@pytest.mark.parametrize("size", [1, 50])
@pytest.mark.parametrize("width", range(20, 26))
def test_lines_are_full_and_never_wider_than_the_terminal(
    width: int, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["x" * (1 + index % 6) for index in range(60)]
    lines = written(LineWriter([""], width), pieces_of([" ".join(words)], size), capsys).splitlines()
    rows = [line.removeprefix("[0] ") for line in lines]
    assert " ".join(rows).split(" ") == words
    assert max(map(len, lines)) <= width
    for row, following in pairwise(rows):
        assert len(f"[0] {row} {following.split()[0]}") > width, "the next word does not fit"


def test_json_has_a_line_for_every_prompt_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    prompts: list[str | list[int]] = ["long", [1, 2], "short"]
    texts = ["a much longer text\n", "日本 \x00\u2028", ""]
    writer = JsonWriter(prompts)
    pieces = list(pieces_of(texts))
    out = written(writer, iter(pieces), capsys)
    assert out.count("\n") == 3, "no newline inside a line"
    for index, line in enumerate(out.splitlines() if "\u2028" not in out else out.strip("\n").split("\n")):
        found = json.loads(line)
        key = "prompt" if isinstance(prompts[index], str) else "prompt_token_ids"
        assert found == {
            "index": index,
            key: prompts[index],
            "text": texts[index],
            "token_ids": [ord(character) for character in texts[index]],
            "finish_reason": "length",
        }


def test_json_of_finished_prompts_is_written_after_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    writer = JsonWriter(["a", "b", "c"])
    for piece in (Piece(2, 0, "x", [1], finish_reason="stop"), Piece(0, 0, "y", [2])):
        writer.add(piece)
    assert capsys.readouterr().out == "", "the first is not finished"
    writer.close()
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line) | {"token_ids": 0} == {
        "index": 2, "prompt": "c", "text": "x", "token_ids": 0, "finish_reason": "stop",
    }  # fmt: skip


def test_json_is_ascii_unless_the_stream_is_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, is_escaped in (("ascii", True), ("latin-1", True), ("utf-8", False), ("UTF8", False)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        writer = JsonWriter(["日"])
        writer.add(Piece(0, 0, "本", [1], finish_reason="stop"))
        line = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert json.loads(line)["text"] == "本"
        assert line.isascii() == is_escaped


def test_the_prompt_is_written_on_terminals_or_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for on_terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)  # noqa: B023
        for echo in (True, False, None):
            for prompts in (["It"], ["It", "The"]):
                writer = make_writer(prompts, as_json=False, echo=echo)
                out = written(writer, pieces_of([" was"] * len(prompts)), capsys)
                assert ("It" in out) == (on_terminal if echo is None else echo)
