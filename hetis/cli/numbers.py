"""Types of argparse for numbers and sizes, with checks of their range.

Their error messages continue the name of the option, which `CommandParser` puts in front: "--num-iters" "is 0: it must
be at least 1."
"""

from argparse import ArgumentTypeError
from collections.abc import Callable

import msgspec

from hetis.core.config import LARGEST_COUNT
from hetis.core.sizes import parse_bytes


def count(least: int) -> Callable[[str], int]:
    """The type of integers from `least` to 2^31 - 1."""

    def parse(text: str) -> int:
        value = _number(text, int)
        if value < least:
            raise ArgumentTypeError(f"is {value}: it must be at least {least}.")
        if value > LARGEST_COUNT:
            raise ArgumentTypeError(f"is {value}: it must be at most {LARGEST_COUNT}.")
        return int(value)

    return parse


def field_of(kind: type[msgspec.Struct], field: str, convert: type[int] | type[float]) -> Callable[[str], float]:
    """The type of numbers that the structure `kind` accepts as its `field`, with its limits and messages."""

    def parse(text: str) -> float:
        value = _number(text, convert)
        try:
            kind(**{field: value})
        except ValueError as error:
            raise ArgumentTypeError(str(error).removeprefix(field).lstrip()) from error
        return value

    return parse


def size_of(kind: type[msgspec.Struct], field: str) -> Callable[[str], int]:
    """The type of sizes, like 4MiB, that the structure `kind` accepts as its `field`."""
    check = field_of(kind, field, int)

    def parse(text: str) -> int:
        return int(check(str(_size(text))))

    return parse


def size_or_none(text: str) -> int:
    """Bytes from text like "2GiB", or 0."""
    return 0 if text.strip() == "0" else _size(text)


def sizes_of_ranks(text: str) -> int | dict[int, int]:
    """Bytes for every rank (from "2GiB") or by rank (from "0=1GiB,1=4GiB")."""
    if "=" not in text:
        return _size(text)
    found: dict[int, int] = {}
    for part in text.split(","):
        name, _, memory = part.partition("=")
        if not (name.isascii() and name.strip().isdecimal()):
            raise ArgumentTypeError(f"is {text!r}: {name.strip()!r} is not a rank; write for example 0=1GiB,1=4GiB.")
        rank = int(name)
        if rank in found:
            raise ArgumentTypeError(f"is {text!r}: it names rank {rank} twice; write for example 0=1GiB,1=4GiB.")
        found[rank] = _size(memory)
    return found


def _number(text: str, convert: type[int] | type[float]) -> float:
    try:
        return convert(text)
    except ValueError:
        kind = "a whole number" if convert is int else "a number"
        raise ArgumentTypeError(f"is {text!r}: it must be {kind}.") from None


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
