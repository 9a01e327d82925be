"""Ids that end a sequence: which file decides, and what no id of the vocabulary is."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetis.models.end_tokens import read_eos_token_ids
from tests.models.test_json_files import VALUES

VOCAB = 1000


def write(directory: Path, **files: Any) -> Path:
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps({"eos_token_id": value}))
    return directory


def test_the_generation_config_comes_first(tmp_path: Path) -> None:
    assert read_eos_token_ids(tmp_path, VOCAB) == []
    write(tmp_path, config=[801, 808, 809])
    assert read_eos_token_ids(tmp_path, VOCAB) == [801, 808, 809]
    write(tmp_path, generation_config=7)
    assert read_eos_token_ids(tmp_path, VOCAB) == [7]
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_eos_token_ids(tmp_path, VOCAB) == [801, 808, 809]


@pytest.mark.parametrize(
    ("value", "usable", "left_out"),
    [
        ([0, -1], [0], "-1"),
        ([0, 128009], [0], "128009"),
        ([999, 1000], [999], "1000"),
        (-1, [], "-1"),
        ("2", [], '"2"'),
        ([2, "3", [4], True, None, 5.0, 2], [2], '"3", [4], true, null, 5.0'),
        ([1, True], [1], "true"),
        (False, [], "false"),
        ({"a": 1}, [], '{"a": 1}'),
        (10**30, [], str(10**30)),
    ],
)
def test_what_is_no_id_is_left_out_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: Any, usable: list[int], left_out: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_eos_token_ids(write(tmp_path, generation_config=value), VOCAB) == usable
    (record,) = caplog.records
    text = record.getMessage()
    assert text == (
        f"{tmp_path / 'generation_config.json'}: eos_token_id {left_out} is left out: the ids of the vocabulary are 0 "
        f"to 999."
    )


def test_usable_ids_say_nothing_and_count_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_eos_token_ids(write(tmp_path, config=[0, 999, 0]), VOCAB) == [0, 999]
    assert not caplog.records


def test_a_file_without_a_usable_id_leaves_it_to_the_next(tmp_path: Path) -> None:
    assert read_eos_token_ids(write(tmp_path, generation_config=-1, config=3), VOCAB) == [3]


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config.json is not a JSON object"):
        read_eos_token_ids(tmp_path, VOCAB)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(VALUES | st.lists(VALUES | st.integers(0, VOCAB), max_size=5))
def test_any_value_gives_ids_of_the_vocabulary(tmp_path: Path, value: Any) -> None:
    ids = read_eos_token_ids(write(tmp_path, generation_config=value), VOCAB)
    assert all(type(token_id) is int and 0 <= token_id < VOCAB for token_id in ids)
    assert len(set(ids)) == len(ids)
