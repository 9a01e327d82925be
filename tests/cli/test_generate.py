"""`hetis generate` with a model of constant answers: output, errors, exit codes; the table of statistics."""

import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from hetis.cli import main as cli
from hetis.cli.generate import counts, fleet_table, summary
from hetis.core.messages import FleetStats, MemberStats
from hetis.frontend import llm
from hetis.frontend.console import render
from hetis.frontend.requests import Piece

# --- the whole command ------------------------------------------------------------------------------------------------


class FakeLLM:
    """Answers every prompt with its reversed text; "bad" fails, and "interrupt" is interrupted."""

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
                yield Piece(index, 0, "", [], finish_reason="error", error="nothing is left to draw from")
                continue
            if prompt == "interrupt":
                raise KeyboardInterrupt
            yield Piece(index, 0, prompt[::-1], [1, 2])
            yield Piece(index, 0, "", [], finish_reason="stop")

    def fleet_stats(self) -> FleetStats:
        return fleet(1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs `FakeLLM`; restores signal handlers and loggers afterwards."""
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


def test_only_the_text_goes_to_standard_output(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert hetis("--prompt", "abc") == 0
    out, err = capsys.readouterr()
    assert out == "cba"
    assert "most query heads held at once" in err
    assert "2 tokens for 1 prompt in" in err


@pytest.mark.parametrize("silence", [("--no-stats",), ("--log-level", "error")])
def test_everything_but_the_text_can_be_silenced(
    silence: tuple[str, ...], fake: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hetis("--prompt", "abc", *silence) == 0
    assert capsys.readouterr() == ("cba", "")


def test_a_failed_prompt_is_reported_and_the_others_are_answered(
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
    """A pipe whose reader is closed."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        super().__init__(os.fdopen(writing, "wb"), write_through=True)


def test_a_closed_reader_ends_the_command_silently(
    fake: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", _Closed())
    assert hetis("--prompt", "abc") == 141
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_an_error_in_one_sentence(
    fake: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert hetis("--prompt", "abc") == 1
        error = "hetis: standard output cannot be written (No space left on device); redirect it elsewhere.\n"
        assert capsys.readouterr().err == error


def test_ctrl_c_ends_the_command_silently(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert hetis("--prompt", "abc", "--prompt", "interrupt", "--json") == 130
    out, err = capsys.readouterr()
    assert (json.loads(out)["text"], err) == ("cba", "")


# --- statistics per device --------------------------------------------------------------------------------------------


def fleet(num_members: int, **changes: Any) -> FleetStats:
    """Statistics with wide numbers."""

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


def test_empty_columns_are_left_out() -> None:
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
            "3 sequences placed on devices, 1 KV head migrated (7.00 GiB), 1 preemption for lack of KV pages.",
        ),
    ],
)
def test_placements_migrations_and_preemptions_are_counted(changes: dict[str, int], text: str) -> None:
    assert counts(fleet(1, **changes)) == text
