"""Sizes as text, read and written."""

from math import ceil, floor

import pytest

from hetis.core.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("2GiB", 2 * 2**30),
        ("2g", 2 * 2**30),
        ("2GB", 2 * 10**9),
        (" 1.5 MiB ", 3 * 2**19),
        (".5k", 512),
        ("7b", 7),
        ("3TiB", 3 * 2**40),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_parsed(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2XB", "-1", "1e9", "1 2", "0", "0.1b", "nan", True, 1.5, None])
def test_refused(text: object) -> None:
    with pytest.raises(ValueError, match="2GiB"):
        parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (3 * 2**30, "3.00 GiB"), (2**50, "1024.00 TiB")],
)
def test_formatted(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize("size", [1, 1023, 1025, 2**20 - 1, 2**20 + 1, 1234567, 2**30 + 12345, 2**43 + 1])
def test_limits_are_rounded_down_and_needs_up(size: int) -> None:
    assert parse_bytes(format_bytes(size, floor)) <= size <= parse_bytes(format_bytes(size, ceil))
