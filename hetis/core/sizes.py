"""Sizes in bytes and counts as text for people."""

import re
from collections.abc import Callable, Iterable
from decimal import Decimal

_UNITS = {
    "": 1,
    "b": 1,
    **{letter: 1024**power for power, letter in enumerate("kmgt", start=1)},
    **{letter + "ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
    **{letter + "b": 1000**power for power, letter in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Bytes of "2GiB", "512M", "1.5 GB" or a plain number. K, M, G, T and KiB .. TiB are powers of 1024; GB is 10^9.

    Raises ValueError for other text, other types, less than one byte, and sizes of 2^63 bytes or more.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ValueError(f"size {text!r} is neither a number nor text; write for example 2GiB.")
    match = _SIZE.fullmatch(str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"size {text!r} is not understood; write for example 2GiB, 512MiB or a number of bytes.")
    size = int(Decimal(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise ValueError(f"size {text!r} is less than one byte; write for example 2GiB.")
    if size >= 2**63:
        raise ValueError(f"size {text!r} is more than any memory; write for example 2GiB.")
    return size


def format_bytes(size: float, rounding: Callable[[float], int] = round) -> str:
    """Short text with a binary unit: "1.50 GiB", "512 B". `rounding`: `ceil` for needs, `floor` for limits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{rounding(size)} B" if unit == "B" else f"{rounding(100 * size) / 100:.2f} {unit}"
        size /= 1024
    return f"{rounding(100 * size) / 100:.2f} TiB"


def plural(number: int, noun: str) -> str:
    """Number and noun, as in "1 prompt" or "2 prompts"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in ascending order, as in "0-3,8"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
