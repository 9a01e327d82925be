"""What `hetis generate` writes: the text itself, lines of several texts, JSON; the table of devices; exit codes."""

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from hetis.cli import main as cli
from hetis.cli.generate import fleet_table, moves, summary
from hetis.cli.writers import JsonWriter, LineWriter, TextWriter, make_writer
from hetis.core.messages import FleetStats, MemberStats
from hetis.frontend import llm
from hetis.frontend.console import render
from hetis.frontend.requests import Piece


def pieces_of(texts: Sequence[str], size: int = 1) -> Iterator[Piece]:
    """Of several texts in turn, `size` characters each; the last one ends it."""
    for start in range(0, max(map(len, texts)) + size, size):
        for index, text in enumerate(texts):
            if start < len(text) + size:
                is_last = start >= len(text)
                ids = [ord(character) for character in text[start : start + size]]
                yield Piece(index, 0, text[start : start + size], ids, "length" if is_last else None)


def written(writer: Any, pieces: Iterator[Piece], capsys: pytest.CaptureFixture[str]) -> str:
    for piece in pieces:
        writer.add(piece)
    writer.close()
    return capsys.readouterr().out


AWKWARD = "\n\n  a long line " + "word " * 60 + "\n\n\ttab\r\nend \x0b\u2028 日本"


@pytest.mark.parametrize("text", [AWKWARD, "", "\n", "no newline", "newline\n"])
def test_one_text_comes_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert written(TextWriter("", ends_line=False), pieces_of([text]), capsys) == text
    assert written(TextWriter("It ", ends_line=False), pieces_of([text]), capsys) == f"It {text}"
    on_terminal = written(TextWriter("It ", ends_line=True), pieces_of([text]), capsys)
    assert on_terminal == f"It {text}" + ("" if text.endswith("\n") else "\n")


def test_one_text_is_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    writer = TextWriter("", ends_line=False)
    for piece in pieces_of(["some text"]):
        writer.add(piece)
        assert capsys.readouterr().out == piece.text, "as soon as it comes"


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
    assert "[1]" in own, "a blank line stays"
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
        assert len(f"[0] {row} {following.split()[0]}") > width, "the next word did not fit"


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


def test_json_keeps_what_is_finished_when_it_is_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    writer = JsonWriter(["a", "b", "c"])
    for piece in (Piece(2, 0, "x", [1], "stop"), Piece(0, 0, "y", [2])):
        writer.add(piece)
    assert capsys.readouterr().out == "", "the first is not finished"
    writer.close()
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line) | {"token_ids": 0} == {
        "index": 2, "prompt": "c", "text": "x", "token_ids": 0, "finish_reason": "stop",
    }  # fmt: skip


def test_json_is_ascii_where_the_stream_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, is_escaped in (("ascii", True), ("latin-1", True), ("utf-8", False), ("UTF8", False)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        writer = JsonWriter(["日"])
        writer.add(Piece(0, 0, "本", [1], "stop"))
        line = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert json.loads(line)["text"] == "本"
        assert line.isascii() == is_escaped


def test_the_prompt_stands_before_its_text_on_terminals_or_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for on_terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)  # noqa: B023
        for echo in (True, False, None):
            for prompts in (["It"], ["It", "The"]):
                writer = make_writer(prompts, as_json=False, echo=echo)
                out = written(writer, pieces_of([" was"] * len(prompts)), capsys)
                assert ("It" in out) == (on_terminal if echo is None else echo)


# --- the whole command, with a model that is made up ------------------------------------------------------------------


class FakeLLM:
    """Answers every prompt with its own characters, backwards; "bad" is not answered."""

    max_model_len = 100

    def __init__(self, **options: Any) -> None:
        assert options["plan"] == "1+0"

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stream(self, prompts: list[str], params: Any) -> Iterator[Piece]:
        for index, prompt in enumerate(prompts):
            if prompt == "bad":
                yield Piece(index, 0, "", [], "error", "nothing is left to draw from")
                continue
            if prompt == "interrupt":
                raise KeyboardInterrupt
            yield from (Piece(index, *piece) for piece in ((0, prompt[::-1], [1, 2]), (0, "", [], "stop")))

    def fleet_stats(self) -> FleetStats:
        return fleet(1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import logging
    import signal

    monkeypatch.setattr(llm, "LLM", FakeLLM)
    monkeypatch.setenv("HETIS_LOG_LEVEL", "info")
    before, loggers = signal.getsignal(signal.SIGINT), [logging.getLogger(name) for name in ("hetis", "hetis_kernels")]
    states = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    signal.signal(signal.SIGINT, before)
    for logger, handlers, level, propagate in states:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def hetis(*arguments: str) -> int:
    """The exit code of `hetis generate` with these arguments."""
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_text_goes_to_standard_output_and_the_rest_does_not(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert hetis("--prompt", "abc") == 0
    out, err = capsys.readouterr()
    assert out == "cba"
    assert "query heads held at the busiest moment" in err
    assert "2 tokens for 1 prompt in" in err


@pytest.mark.parametrize("silence", [("--no-stats",), ("--log-level", "error")])
def test_the_rest_can_be_silenced(silence: tuple[str, ...], fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert hetis("--prompt", "abc", *silence) == 0
    assert capsys.readouterr() == ("cba", "")


def test_a_prompt_without_an_answer_is_named_and_the_others_are_answered(
    fake: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hetis("--json", "--no-stats", "--prompt", "abc", "--prompt", "bad", "--prompt", "def") == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["text"], line["finish_reason"], line.get("error")) for line in lines] == [
        ("cba", "stop", None),
        ("", "error", "nothing is left to draw from"),
        ("fed", "stop", None),
    ]
    assert err == "hetis: prompt 1: nothing is left to draw from\n"


class _Closed(io.TextIOWrapper):
    """A pipe whose reader has gone."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        super().__init__(os.fdopen(writing, "wb"), write_through=True)


def test_a_reader_that_went_away_ends_it_without_a_word(
    fake: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", _Closed())
    assert hetis("--prompt", "abc") == 141
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_one_sentence(
    fake: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert hetis("--prompt", "abc") == 1
        assert capsys.readouterr().err == "hetis: standard output cannot be written (No space left on device).\n"


def test_ctrl_c_ends_it_without_a_word(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert hetis("--prompt", "abc", "--prompt", "interrupt", "--json") == 130
    out, err = capsys.readouterr()
    assert (json.loads(out)["text"], err) == ("cba", "")


# --- what each device did ---------------------------------------------------------------------------------------------


def fleet(num_members: int, **changes: Any) -> FleetStats:
    """A large one, whose numbers are wide."""

    def member(rank: int) -> MemberStats:
        role = "primary" if rank < 2 else "attention worker"
        peers = range(2, num_members) if rank < 2 else range(2)
        return MemberStats(
            rank=rank, role=role, device=f"cuda:{rank}", heads=0, heads_peak=2345, pages_used=0,
            pages_total=123456, pages_peak=23456, attention_seconds=123.45, attention_share=1.0,
            bytes_sent={f"{rank}->{peer}": 1023 << 30 for peer in peers if peer < num_members}, bytes_received={},
            model=None, predicted_us=123.0, measured_us=changes.get("measured_us", 0.0),
        )  # fmt: skip

    return FleetStats(
        members=[member(rank) for rank in range(num_members)], num_steps=1, num_rebalances=4, num_reliefs=5,
        num_preemptions=changes.get("num_preemptions", 0), num_dispatches=changes.get("num_dispatches", 1),
        num_migrations=changes.get("num_migrations", 0), migrated_bytes=7 << 30,
    )  # fmt: skip


def test_the_table_of_a_large_fleet_fits_100_columns() -> None:
    text = render(fleet_table(fleet(8, measured_us=130.0)))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("GiB") == 2 * 6 + 6 * 2
    assert "23456 / 123456" in text
    assert "130 (123)" in text


def test_columns_without_anything_are_left_out() -> None:
    header = render(fleet_table(fleet(1))).splitlines()[0].split("  ")
    assert [title.strip() for title in header if title.strip()] == [
        "rank", "role", "device", "heads", "KV pages", "attention",
    ]  # fmt: skip
    assert "us/layer" in summary(fleet(1, measured_us=1.0), 32)
    assert "us/layer" not in summary(fleet(1), 32)


def test_every_column_is_explained() -> None:
    text = summary(fleet(3, measured_us=1.0), 32)
    for title in ("heads: ", "KV pages: ", "attention: ", "us/layer: "):
        assert title in text
    assert "32 tokens" in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "1 sequence placed on devices."),
        ({"num_dispatches": 3}, "3 sequences placed on devices."),
        (
            {"num_dispatches": 3, "num_migrations": 1, "num_preemptions": 1},
            "3 sequences placed on devices, 1 KV head moved between them (7.00 GiB), 1 sequence started over for want "
            "of KV pages.",
        ),
    ],
)
def test_moves_are_counted_in_words(changes: dict[str, int], text: str) -> None:
    assert moves(fleet(1, **changes)) == text
