"""End-of-sequence ids: those of the configs, restricted to the vocabulary, and that of the tokenizer."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hetis.models.end_tokens import read_eos_token_ids, read_tokenizer_eos
from hetis.models.hub import PACKAGED
from tests.models.test_json_files import VALUES

VOCAB = 1000
WORDS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
ADDED = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False}


# --- configs ----------------------------------------------------------------------------------------------------------


def write(directory: Path, **files: Any) -> Path:
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps({"eos_token_id": value}))
    return directory


def test_generation_config_takes_precedence(tmp_path: Path) -> None:
    assert read_eos_token_ids(tmp_path, VOCAB) == []
    write(tmp_path, config=[801, 808, 809])
    assert read_eos_token_ids(tmp_path, VOCAB) == [801, 808, 809]
    write(tmp_path, generation_config=7)
    assert read_eos_token_ids(tmp_path, VOCAB) == [7]
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_eos_token_ids(tmp_path, VOCAB) == [801, 808, 809]


@pytest.mark.parametrize(
    ("value", "valid", "dropped"),
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
def test_invalid_ids_are_dropped_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: Any, valid: list[int], dropped: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_eos_token_ids(write(tmp_path, generation_config=value), VOCAB) == valid
    (record,) = caplog.records
    text = record.getMessage()
    assert text == (
        f"{tmp_path / 'generation_config.json'}: eos_token_id {dropped} is ignored: the ids of the vocabulary are 0 "
        f"to 999."
    )


def test_valid_ids_are_deduplicated_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_eos_token_ids(write(tmp_path, config=[0, 999, 0]), VOCAB) == [0, 999]
    assert not caplog.records


def test_a_file_without_a_valid_id_is_passed_over(tmp_path: Path) -> None:
    assert read_eos_token_ids(write(tmp_path, generation_config=-1, config=3), VOCAB) == [3]


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
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


# --- tokenizer --------------------------------------------------------------------------------------------------------


def write_tokenizer(directory: Path, model: Any, **files: Any) -> Path:
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


MODELS = {
    "word level": models.WordLevel(WORDS, unk_token="a"),
    "bpe": models.BPE(WORDS, []),
    "unigram": models.Unigram([(word, -1.0) for word in WORDS], unk_id=0),
}


@pytest.mark.parametrize("name", ["<|im_end|>", "</s>", ADDED])
@pytest.mark.parametrize("kind", MODELS)
def test_tokenizer_eos_equals_that_of_transformers(kind: str, name: Any, tmp_path: Path) -> None:
    directory = write_tokenizer(
        tmp_path, MODELS[kind], tokenizer_config={"eos_token": name, "tokenizer_class": "LlamaTokenizer"}
    )
    assert read_tokenizer_eos(directory) == [PreTrainedTokenizerFast.from_pretrained(directory).eos_token_id]


def test_special_tokens_map_is_used_if_the_tokenizer_config_names_none(tmp_path: Path) -> None:
    named = {"eos_token": ADDED}
    assert read_tokenizer_eos(write_tokenizer(tmp_path, MODELS["bpe"], special_tokens_map=named)) == [5]
    assert read_tokenizer_eos(write_tokenizer(tmp_path, MODELS["bpe"], tokenizer_config={"eos_token": "</s>"})) == [1]


def test_vocabulary_files_of_older_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(WORDS))
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 9}')
    for name, expected in (("</s>", 1), ("<|im_end|>", 9)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        assert read_tokenizer_eos(tmp_path) == [expected]


@pytest.mark.parametrize("config", [{}, {"eos_token": None}, {"eos_token": "<nowhere>"}, {"eos_token": {}}])
def test_a_tokenizer_without_an_eos_token_has_none(config: dict[str, Any], tmp_path: Path) -> None:
    assert read_tokenizer_eos(tmp_path) == []
    assert read_tokenizer_eos(write_tokenizer(tmp_path, MODELS["bpe"], tokenizer_config=config)) == []


def test_tokenizer_eos_of_the_packaged_model() -> None:
    assert read_tokenizer_eos(PACKAGED) == [PreTrainedTokenizerFast.from_pretrained(PACKAGED).eos_token_id]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_a_broken_tokenizer_file_is_named(file: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, MODELS["bpe"], tokenizer_config={"eos_token": "</s>"})
    (tmp_path / file).write_text("{")
    with pytest.raises(ValueError, match=f"{file} cannot be read"):
        read_tokenizer_eos(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b'{"a":' * 100_000, b"\xff\xfe", b'{"model": {"vocab": [[]]}}', b'{"model": {"vocab": [[["</s>"], 1]]}}'],
)
def test_malformed_contents_of_tokenizer_json_are_an_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, MODELS["bpe"], tokenizer_config={"eos_token": "</s>"})
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read"):
        read_tokenizer_eos(tmp_path)
