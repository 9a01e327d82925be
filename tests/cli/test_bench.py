"""`hetis bench` without a fleet: percentiles, rounding, and loads that do not fit."""

import argparse
import json
import math
from pathlib import Path

import pytest

from hetis.cli.bench import DIGITS, check_lengths, percentiles_of, publish, rounded


@pytest.mark.parametrize("value", [1 / 3, 123456.789, 1e-9 / 7, 2e12 / 3, -math.pi, 0.0])
def test_measured_numbers_keep_their_significant_digits(value: float) -> None:
    [short] = rounded([value])
    assert short == pytest.approx(value, rel=10 ** (1 - DIGITS))
    assert len(f"{short!r}".partition("e")[0].replace(".", "").strip("-0")) <= DIGITS


def test_counts_names_and_structure_are_unchanged() -> None:
    value = {"a": 123456789, "b": [1.0, {"c": "text", "d": None}], "e": True}
    assert rounded(value) == value


def test_percentiles_lie_between_the_closest_values() -> None:
    expected = {"10": 1.3, "25": 1.75, "50": 2.5, "75": 3.25, "90": 3.7, "99": 3.97}
    assert percentiles_of([4.0, 1.0, 3.0, 2.0]) == pytest.approx(expected)
    assert set(percentiles_of([7.0]).values()) == {7.0}


def test_a_load_that_does_not_fit_the_context_is_refused() -> None:
    options = argparse.Namespace(input_len=24, output_len=1000)
    check_lengths(options, 1024)
    with pytest.raises(
        ValueError, match=r"--input-len 24 and --output-len 1000 make sequences of 1024 tokens, .* 1023"
    ):
        check_lengths(options, 1023)


def test_the_json_goes_to_standard_output_and_file_and_the_table_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = argparse.Namespace(output_json=tmp_path / "out.json")
    publish(options, {"avg_latency": 1 / 3}, [("average", "0.333 s")])
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(options.output_json.read_text()) == {"avg_latency": 0.333333}
    assert err.split() == ["average", "0.333", "s"]
