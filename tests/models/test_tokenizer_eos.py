"""The tokenizer's own end of sequence, found without transformers, and equal to what transformers finds."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hetis.models.hub import PACKAGED
from hetis.models.tokenizer_eos import read_tokenizer_eos

WORDS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
ADDED = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False}


def write(directory: Path, model: Any, **files: Any) -> Path:
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
def test_it_is_the_one_that_transformers_finds(kind: str, name: Any, tmp_path: Path) -> None:
    directory = write(tmp_path, MODELS[kind], tokenizer_config={"eos_token": name, "tokenizer_class": "LlamaTokenizer"})
    assert read_tokenizer_eos(directory) == [PreTrainedTokenizerFast.from_pretrained(directory).eos_token_id]


def test_the_special_tokens_map_counts_where_the_config_is_silent(tmp_path: Path) -> None:
    named = {"eos_token": ADDED}
    assert read_tokenizer_eos(write(tmp_path, MODELS["bpe"], special_tokens_map=named)) == [5]
    assert read_tokenizer_eos(write(tmp_path, MODELS["bpe"], tokenizer_config={"eos_token": "</s>"})) == [1]


def test_vocabulary_files_of_older_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(WORDS))
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 9}')
    for name, expected in (("</s>", 1), ("<|im_end|>", 9)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        assert read_tokenizer_eos(tmp_path) == [expected]


@pytest.mark.parametrize("config", [{}, {"eos_token": None}, {"eos_token": "<nowhere>"}, {"eos_token": {}}])
def test_none_is_none(config: dict[str, Any], tmp_path: Path) -> None:
    assert read_tokenizer_eos(tmp_path) == []
    assert read_tokenizer_eos(write(tmp_path, MODELS["bpe"], tokenizer_config=config)) == []


def test_the_packaged_model() -> None:
    assert read_tokenizer_eos(PACKAGED) == [PreTrainedTokenizerFast.from_pretrained(PACKAGED).eos_token_id]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_a_broken_file_is_named(file: str, tmp_path: Path) -> None:
    write(tmp_path, MODELS["bpe"], tokenizer_config={"eos_token": "</s>"})
    (tmp_path / file).write_text("{")
    with pytest.raises(ValueError, match=f"{file} cannot be read"):
        read_tokenizer_eos(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b'{"a":' * 100_000, b"\xff\xfe", b'{"model": {"vocab": [[]]}}', b'{"model": {"vocab": [[["</s>"], 1]]}}'],
)
def test_whatever_stands_in_a_file_it_is_named(content: bytes, tmp_path: Path) -> None:
    write(tmp_path, MODELS["bpe"], tokenizer_config={"eos_token": "</s>"})
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read"):
        read_tokenizer_eos(tmp_path)
