"""Prompts of `hetis generate` from the command line, a file or standard input."""

import argparse
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hetis.launch import torchrun

SourcePrompt = str | list[int]

EXAMPLES = (  # the model in the package was trained on the documentation of Python
    "The function returns",
    "If the file does not exist,",
    "A list is a sequence of",
    "This module provides",
)
STANDARD_INPUT = "-"


def prompts_of(options: argparse.Namespace) -> list[SourcePrompt]:
    """Prompts from --prompt or --prompt-file, else from standard input if it is a pipe or a file, else examples.

    Raises ValueError for a file that cannot be read, is empty or has a line without a prompt.
    """
    if options.prompt:
        return [text_of_argument(argument) for argument in options.prompt]
    if options.prompt_file is not None:
        return read_prompt_file(options.prompt_file)
    return read_prompt_file(STANDARD_INPUT) if input_is_redirected() else [*EXAMPLES]


def text_of_argument(argument: str) -> str:
    """Text of a command-line argument: bytes that the locale cannot decode (lone surrogates) are decoded as UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        with suppress(UnicodeError):
            return os.fsencode(argument).decode()
    return argument


def input_is_redirected() -> bool:
    """Whether standard input is a pipe or file. Under torchrun it belongs to torchrun and is read on request only."""
    if torchrun.is_root:
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_prompt_file(name: str) -> list[SourcePrompt]:
    """Prompts in the UTF-8 file `name` ("-": standard input), in the form of `parse_prompts`."""
    what = "standard input" if name == STANDARD_INPUT else f"prompt file {name}"
    try:
        content = sys.stdin.buffer.read() if name == STANDARD_INPUT else Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"{what} cannot be read ({error.strerror}); name a text file.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{what} is not UTF-8 text (line {line}); save it as UTF-8.") from error
    prompts = list(parse_prompts(text, what))
    if not prompts:
        raise ValueError(f"{what} has no prompt; write one per line.")
    return prompts


def parse_prompts(text: str, what: str) -> Iterator[SourcePrompt]:
    """Yields one prompt per line; empty lines are skipped.

    If the first line is a JSON object with one of these keys, all lines must be: {"prompt": "text"}, where the text may
    have several lines, or {"prompt_token_ids": [1, 2]}; other keys are ignored. Raises ValueError, with the number of
    the line, for a line of another form.
    """
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    is_json = bool(lines) and not {"prompt", "prompt_token_ids"}.isdisjoint(_object_of(lines[0][1]))
    for number, line in lines:
        prompt = _prompt_of(line) if is_json else line
        if prompt is None:
            raise ValueError(
                f'{what}, line {number} is not a JSON object with "prompt" (text) or "prompt_token_ids" (a list of '
                f"integers); all lines must be such objects if the first has one of these keys."
            )
        yield prompt


def _object_of(line: str) -> dict[str, Any]:
    """The JSON object in a line; empty if there is none."""
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _prompt_of(line: str) -> SourcePrompt | None:
    """The prompt in a line of JSON; None if it is not JSON or has no prompt."""
    found = _object_of(line)
    text, ids = found.get("prompt"), found.get("prompt_token_ids")
    if isinstance(text, str):
        return text
    return ids if isinstance(ids, list) and all(type(token) is int for token in ids) else None
