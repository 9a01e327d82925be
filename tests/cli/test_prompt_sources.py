"""Sources of prompts, and files that are refused."""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hetis.cli.prompt_sources import EXAMPLES, parse_prompts, prompts_of, read_prompt_file
from hetis.launch import torchrun


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one", ["one"]),
        ("\n  \none\r\n\n two \n", ["one", " two "]),
        ("a\x0bb\u2028c\nd", ["a\x0bb\u2028c", "d"]),  # only a newline ends a line
        ('{"prompt": "a\\nb", "id": 7}\n\n{"prompt_token_ids": [1, 2]}\n', ["a\nb", [1, 2]]),
        ('{"prompt": ""}', [""]),
        ("{not JSON}\n[1, 2]\n", ["{not JSON}", "[1, 2]"]),
        ('{"other": "key"}\n', ['{"other": "key"}']),
        ("42\n", ["42"]),
        ("[" * 100_000, ["[" * 100_000]),
        ("", []),
    ],
)
def test_lines_are_prompts(text: str, prompts: list[str | list[int]]) -> None:
    assert list(parse_prompts(text, "file")) == prompts


@pytest.mark.parametrize(
    "line", ["text", "{", "[]", '{"prompt": 3}', '{"prompt_token_ids": [1.0]}', '{"prompt_token_ids": [true]}', "{}"]
)
def test_a_line_of_another_form_is_refused(line: str) -> None:
    with pytest.raises(
        ValueError,
        match=r'^file, line 4 is not a JSON object with "prompt" .*; all lines must be such objects if the first has ',
    ):
        list(parse_prompts(f'\n{{"prompt": "a"}}\n\n{line}\n', "file"))


@pytest.mark.parametrize("line", ['{"prompt": 3}', '{"prompt_token_ids": "1, 2"}', '{"prompt": null}'])
def test_a_first_line_with_a_key_of_prompts_and_a_wrong_value_is_no_text(line: str) -> None:
    with pytest.raises(ValueError, match=r'^file, line 1 is not a JSON object with "prompt" \(text\)'):
        list(parse_prompts(f"{line}\n", "file"))


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    empty, latin = tmp_path / "empty", tmp_path / "latin"
    empty.write_text("\n \n")
    latin.write_bytes(b"fine\ncaf\xe9\n")
    for path, why in (
        (empty, "has no prompt; write one per line."),
        (latin, "is not UTF-8 text (line 2); save it as UTF-8."),
        (tmp_path / "missing", "cannot be read (No such file or directory); name a text file."),
        (tmp_path, "cannot be read (Is a directory); name a text file."),
    ):
        with pytest.raises(ValueError) as caught:
            read_prompt_file(str(path))
        assert str(caught.value) == f"prompt file {path} {why}"


def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert read_prompt_file(str(tmp_path / "file")) == ["a"]


@pytest.mark.parametrize("text", ["Grüße 世界", "plain", ""])
def test_arguments_are_utf8_whatever_the_locale(text: str) -> None:
    """Python decodes other bytes as lone surrogates in an ASCII locale."""
    argument = text.encode().decode("ascii", "surrogateescape")
    assert prompts_of(argparse.Namespace(prompt=[argument])) == [text]


def test_an_argument_that_is_not_utf8_is_unchanged() -> None:
    argument = b"caf\xe9".decode("ascii", "surrogateescape")
    assert prompts_of(argparse.Namespace(prompt=[argument])) == [argument]  # and is refused as a prompt


class TestSources:
    """Sources of `hetis generate`, by its options and its standard input."""

    @pytest.fixture
    def pipe(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """A pipe with two prompts as standard input."""
        reading, writing = os.pipe()
        os.write(writing, b"one\ntwo\n")
        os.close(writing)
        with os.fdopen(reading) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            yield

    @staticmethod
    def prompts(prompt: list[str] | None = None, prompt_file: str | None = None) -> list[str | list[int]]:
        return prompts_of(argparse.Namespace(prompt=prompt, prompt_file=prompt_file))

    def test_a_pipe_is_read(self, pipe: None) -> None:
        assert self.prompts() == ["one", "two"]

    def test_a_pipe_is_read_on_request(self, pipe: None) -> None:
        assert self.prompts(prompt_file="-") == ["one", "two"]

    def test_prompts_of_the_command_line_have_precedence(self, pipe: None) -> None:
        assert self.prompts(prompt=["this"]) == ["this"]

    def test_under_torchrun_the_pipe_is_not_read(self, pipe: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torchrun, "is_root", True)
        assert self.prompts() == [*EXAMPLES]

    def test_a_file_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("one\n")
        with (tmp_path / "file").open() as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            assert self.prompts() == ["one"]

    def test_the_null_device_and_a_stream_without_a_file_are_not_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with open(os.devnull) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            assert self.prompts() == [*EXAMPLES]
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
        assert self.prompts() == [*EXAMPLES]
