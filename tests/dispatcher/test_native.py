"""The C++ solver against its Python reference: the same counts and bounds, to the last bit, on every problem."""

import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random

import msgspec
import pytest

from hetis.dispatcher import balance, bound, native
from hetis.dispatcher.balance import balance_ref
from hetis.dispatcher.bound import is_possible_ref, least_possible_us_ref
from hetis.dispatcher.problem import Problem, longest_first, peak_us
from tests.dispatcher.instances import tiny_problem
from tests.dispatcher.random_problems import random_problem

LIBRARY = native.load()


def some_problems(seed: int, count: int) -> Iterator[Problem]:
    """Fleets as they exist; coarse lanes with little memory; sequences that are all alike, so that everything ties."""
    rng = Random(seed)
    for index in range(count):
        if index % 3 == 0:
            yield random_problem(rng, rng.choice((1, 2, 4, 8, 16)), rng.choice((2, 3, 4, 8, 16)))
        elif index % 3 == 1:
            yield tiny_problem(rng, rng.randint(1, 8), rng.randint(1, 6))
        else:
            problem = tiny_problem(rng, rng.randint(2, 12), rng.randint(2, 4))
            alike = [[row[0]] * len(row) for row in problem.lane_us]
            yield msgspec.structs.replace(problem, lane_us=alike)


@pytest.mark.parametrize("seed", range(6))
def test_counts_and_bounds_are_those_of_the_reference(seed: int) -> None:
    assert LIBRARY is not None
    num_found = 0
    for problem in some_problems(seed, 90):
        counts = balance_ref(problem)
        assert LIBRARY.balance(problem) == counts
        if counts is not None:
            num_found += 1
            peak, order = peak_us(problem, counts), longest_first(problem)
            for limit_us in (0.5 * peak, 0.9 * peak, 0.97 * peak, peak):
                assert LIBRARY.is_possible(problem, limit_us) == is_possible_ref(problem, order, limit_us)
            assert LIBRARY.least_possible_us(problem, peak) == least_possible_us_ref(problem, peak)
    assert num_found > 50


def test_many_sequences_on_many_devices_too() -> None:
    assert LIBRARY is not None
    rng = Random(1)
    for _ in range(4):
        problem = random_problem(rng, 64, 64)
        assert LIBRARY.balance(problem) == balance_ref(problem)


def test_without_the_library_the_reference_decides_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    problem = random_problem(Random(2), 6, 5)
    counts = balance_ref(problem)
    assert counts is not None
    peak = peak_us(problem, counts)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.find.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.load() is None
            assert balance.balance(problem) == counts
            assert bound.is_possible(problem, peak)
            assert bound.least_possible_us(problem, peak) == least_possible_us_ref(problem, peak)
        assert len(caplog.records) == 1
        assert "not built: hetis runs from sources that were not installed" in caplog.text
        (tmp_path / "_solver.missing").write_text("there was no C++ compiler (install g++)")
        native.find.cache_clear()
        assert native.load() is None
        assert "not built: there was no C++ compiler (install g++);" in caplog.text
    finally:
        native.find.cache_clear()


OF_ANOTHER_MACHINE = "cannot be loaded"
WITHOUT_OUR_FUNCTIONS = "undefined symbol: hetis_interface"


@pytest.mark.parametrize("reason", [OF_ANOTHER_MACHINE, WITHOUT_OUR_FUNCTIONS])
def test_a_library_that_cannot_be_used_counts_as_missing(
    reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if reason == OF_ANOTHER_MACHINE:
        (tmp_path / "_solver.so").write_bytes(b"of another machine")
    else:
        (tmp_path / "_solver.so").symlink_to(msgspec._core.__file__)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.find.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.load() is None
        assert reason in caplog.text
        assert "--no-deps ." in caplog.text
    finally:
        native.find.cache_clear()


def test_a_library_with_another_interface_counts_as_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    native.find.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.load() is None
        assert f"it has interface {native.INTERFACE - 1}" in caplog.text
    finally:
        native.find.cache_clear()
