"""What the requests of a run look like: lengths, shared prefixes, and the rows of a trace. Functions of data."""

import csv
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class Shape(NamedTuple):
    """Lengths of a request in tokens. `prefix`: which shared prefix comes before the `input_len` tokens of its own."""

    input_len: int
    output_len: int
    prefix: int | None = None


class TraceRow(NamedTuple):
    """A request of a trace, `at` seconds after the first one."""

    at: float
    input_len: int
    output_len: int


def random_shapes(count: int, input_len: int, output_len: int, spread: float, seed: tuple[int, ...]) -> list[Shape]:
    """Lengths drawn uniformly from `length` times 1 - spread to 1 + spread, at least 1, as vLLM's range ratio."""
    draw = np.random.default_rng(seed)

    def lengths(mean: int) -> list[int]:
        least, most = max(1, int(mean * (1 - spread))), max(1, int(mean * (1 + spread)))
        return [int(length) for length in draw.integers(least, most, size=count, endpoint=True)]

    return [Shape(*pair) for pair in zip(lengths(input_len), lengths(output_len), strict=True)]


def with_prefixes(shapes: Sequence[Shape], num_prefixes: int, seed: tuple[int, ...]) -> list[Shape]:
    """The same requests, each with one of `num_prefixes` shared prefixes drawn at random."""
    drawn = np.random.default_rng(seed).integers(num_prefixes, size=len(shapes))
    return [shape._replace(prefix=int(prefix)) for shape, prefix in zip(shapes, drawn, strict=True)]


def read_trace(path: Path) -> list[TraceRow]:
    """The rows of a CSV file with columns TIMESTAMP, ContextTokens and GeneratedTokens, by time.

    Timestamps are seconds or ISO 8601. Lengths of 0 become 1. Raises ValueError, naming the line, for anything else.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise ValueError(f"--dataset-path {path} has no column {missing[0]}; it needs {', '.join(COLUMNS)}.")
            rows = [_row(line, f"--dataset-path {path}, line {reader.line_num}") for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--dataset-path {path} cannot be read ({reason}); give a CSV file.") from None
    if not rows:
        raise ValueError(f"--dataset-path {path} has no rows; give a trace with at least one request.")
    rows.sort(key=lambda row: row.at)
    return [row._replace(at=row.at - rows[0].at) for row in rows]


def _row(line: dict[str, str | None], where: str) -> TraceRow:
    at, *lengths = (line[name] for name in COLUMNS)
    try:
        numbers = [int(float(length or "")) for length in lengths]
        seconds = _seconds(at or "")
        if not math.isfinite(seconds):
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{where}: {at!r}, {lengths} is not a time and two numbers of tokens.") from None
    return TraceRow(seconds, max(1, numbers[0]), max(1, numbers[1]))


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text.strip()).timestamp()


def scaled(rows: Sequence[TraceRow], scale: float, speed: float) -> list[TraceRow]:
    """The trace with lengths times `scale`, at least 1, and times divided by `speed`."""
    return [
        TraceRow(row.at / speed, max(1, round(row.input_len * scale)), max(1, round(row.output_len * scale)))
        for row in rows
    ]
