"""Writers of `hetis generate`: texts go to standard output while they are generated."""

import json
import shutil
import sys
from collections.abc import Sequence
from typing import Protocol

from hetis.cli.prompt_sources import SourcePrompt
from hetis.frontend.console import is_terminal, write
from hetis.frontend.requests import Piece

WIDTH = 100  # characters; limit of a line on a terminal


class Writer(Protocol):
    """Writes the pieces of all prompts to standard output."""

    def add(self, piece: Piece) -> None:
        """Takes over the next piece of a prompt's text."""

    def close(self) -> None:
        """Writes what is pending; called after the last piece, also of an interrupted run."""


def make_writer(prompts: Sequence[SourcePrompt], *, as_json: bool, echo: bool | None) -> Writer:
    """A writer of JSON lines, of the text itself for one prompt, or of lines with their prompt's number for several.

    `echo`: write each prompt before its text; None: on terminals only.
    """
    on_terminal = is_terminal(sys.stdout)
    if as_json:
        return JsonWriter(prompts)
    beginnings = [
        prompt if isinstance(prompt, str) and (on_terminal if echo is None else echo) else "" for prompt in prompts
    ]
    if len(prompts) == 1:
        return TextWriter(beginnings[0], ends_line=on_terminal)
    width = min(WIDTH, shutil.get_terminal_size().columns) if on_terminal else None
    return LineWriter(beginnings, width)


class TextWriter:
    """Writes one text unchanged. `ends_line`: with a newline at the end, if it has none."""

    def __init__(self, beginning: str, ends_line: bool) -> None:
        self._ends_line, self._last = ends_line, beginning
        write(beginning)

    def add(self, piece: Piece) -> None:
        if piece.text:
            self._last = piece.text
            write(piece.text)

    def close(self) -> None:
        if self._ends_line and self._last and not self._last.endswith("\n"):
            write("\n")


class LineWriter:
    """Writes several texts line by line, each line with the number of its prompt.

    `width`: longer lines are broken at words; None: they are not.
    """

    def __init__(self, beginnings: Sequence[str], width: int | None) -> None:
        self._pending = [*beginnings]
        self._prefixes = [f"[{index}] " for index in range(len(beginnings))]
        self._width = None if width is None else max(1, width - len(self._prefixes[-1]))

    def add(self, piece: Piece) -> None:
        index = piece.prompt_index
        self._pending[index] += piece.text
        while (parts := self._split(self._pending[index])) is not None:
            self._write(index, *parts)
        if piece.finished and self._pending[index]:
            self._write(index, self._pending[index], "")

    def _split(self, text: str) -> tuple[str, str] | None:
        """(line, rest); None while the line may continue."""
        line, newline, rest = text.partition("\n")
        if self._width is None or len(line) <= self._width:
            return (line, rest) if newline else None
        border = text.rfind(" ", 0, self._width + 1)
        border = self._width if border <= 0 else border
        return text[:border], text[border:].removeprefix(" ")

    def _write(self, index: int, line: str, rest: str) -> None:
        self._pending[index] = rest
        write(f"{self._prefixes[index]}{line}".rstrip() + "\n")

    def close(self) -> None:
        """Writes unfinished lines."""
        for index, line in enumerate(self._pending):
            if line:
                self._write(index, line, "")


class JsonWriter:
    """Writes one line of JSON per prompt, in the order of the prompts, as soon as earlier ones are finished."""

    def __init__(self, prompts: Sequence[SourcePrompt]) -> None:
        self._prompts = prompts
        self._texts: list[list[str]] = [[] for _ in prompts]
        self._ids: list[list[int]] = [[] for _ in prompts]
        self._finished: dict[int, str] = {}
        self._next = 0
        self._ascii = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "") != "utf8"

    def add(self, piece: Piece) -> None:
        self._texts[piece.prompt_index].append(piece.text)
        self._ids[piece.prompt_index] += piece.token_ids
        if piece.finished:
            self._finished[piece.prompt_index] = self._line(piece)
        while self._next in self._finished:
            write(self._finished.pop(self._next))
            self._next += 1

    def _line(self, last: Piece) -> str:
        index = last.prompt_index
        prompt = self._prompts[index]
        result: dict[str, object] = {
            "index": index,
            ("prompt" if isinstance(prompt, str) else "prompt_token_ids"): prompt,
            "text": "".join(self._texts[index]),
            "token_ids": self._ids[index],
            "finish_reason": last.finish_reason,
        }
        if last.error is not None:
            result["error"] = last.error
        return json.dumps(result, ensure_ascii=self._ascii) + "\n"

    def close(self) -> None:
        """Writes finished prompts that follow an unfinished one, after an interrupt."""
        for index in sorted(self._finished):
            write(self._finished.pop(index))
