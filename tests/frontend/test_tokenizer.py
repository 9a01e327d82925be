"""Tokenizers: tokenizer.json decides the ids, whatever class tokenizer_config.json names."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hetis.frontend import tokenizer as tokenizer_module
from hetis.frontend.tokenizer import encode, load_tokenizer
from tests.byte_level import train_byte_level

CORPUS = ["hello world, in 2024 there were 12345 of them", "It's naïve — 日本語"] * 20
TEXTS = [
    "hello world",
    " hello  world ",
    "in 2024 there were 12345 of them",
    "It's\n\nnaïve",
    "<s>hello</s> world",
    "日本語",
    "",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def sentencepiece_like(prefix: bool) -> Tokenizer:
    """A tokenizer like Llama-2's; without `prefix`, like Yi's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    front = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level(pattern: str, prefix: bool) -> Tokenizer:
    """A tokenizer like GPT-2's, with its own or another regular expression."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    return train_byte_level(CORPUS, 420, SPECIAL, pre_tokenizers.Sequence([split, to_bytes]))


def with_limits() -> Tokenizer:
    """A tokenizer that was saved with truncation and padding enabled."""
    tokenizer = byte_level(r"\p{N}|[^\p{N}]+", False)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama-2": lambda: sentencepiece_like(True),
    "yi": lambda: sentencepiece_like(False),
    "three digits": lambda: byte_level(r"\p{N}{1,3}|[^\p{N}]+", False),
    "prefix space": lambda: byte_level(r"\p{N}|[^\p{N}]+", True),
    "limits": with_limits,
}
CLASSES = [
    "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "GemmaTokenizer",
    "PreTrainedTokenizerFast", "TokenizersBackend", "T5Tokenizer", "NoSuchTokenizer", None,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("named", CLASSES)
def test_ids_and_text_are_those_of_the_file(kind: str, named: str | None, tmp_path: Path) -> None:
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": named, "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "legacy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": True}))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    file.no_truncation()
    file.no_padding()
    ours = load_tokenizer(tmp_path, None)
    for text in TEXTS:
        for special in (True, False):
            expected = file.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, add_special_tokens=special) == expected
            assert ours.backend_tokenizer.encode(text, add_special_tokens=special).ids == expected
        assert ours.backend_tokenizer.decode(expected) == file.decode(expected)
    assert (ours.bos_token_id, ours.eos_token_id) == (file.token_to_id("<s>"), file.token_to_id("</s>"))


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_chat_template_is_read_from_the_directory(where: str, tmp_path: Path) -> None:
    KINDS["yi"]().save(str(tmp_path / "tokenizer.json"))
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}
    if where == "chat_template.jinja":
        (tmp_path / where).write_text(template)
    else:
        config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    rendered = load_tokenizer(tmp_path, None).apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<s>hi"


def test_a_begin_of_sequence_is_not_doubled(tmp_path: Path) -> None:
    KINDS["yi"]().save(str(tmp_path / "tokenizer.json"))  # puts <s> in front of text
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    ours = load_tokenizer(tmp_path, None)
    hello = encode(ours, "hello", add_special_tokens=False)
    assert encode(ours, "hello") == [1, *hello]
    assert encode(ours, "<s>hello") == [1, *hello]
    assert encode(ours, "<s>hello", add_special_tokens=False) == [1, *hello]
    assert encode(ours, "<s><s>hello") == [1, 1, *hello], "a token that the user wrote twice stays twice"
    assert encode(ours, "") == [1]
    ours.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert encode(ours, "<s>hello") == [1, *hello, 2]


def test_a_tokenizer_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    """OPT ships vocab.json and merges.txt only."""
    byte_level(r"\p{N}|[^\p{N}]+", False).model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    ours = load_tokenizer(tmp_path, None)
    assert ours.backend_tokenizer.decode(ours.encode("hello world")) == "hello world"


def test_only_tokenizer_model_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install sentencepiece protobuf, or give the tokenizer.json"):
        load_tokenizer(tmp_path, None)


def test_a_model_may_have_no_tokenizer_but_a_named_tokenizer_must_exist(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path, None) is None
    with pytest.raises(ValueError, match=r"^tokenizer '.*' has none of tokenizer.json"):
        load_tokenizer(tmp_path, None, what="tokenizer")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"tokenizer in {tmp_path} cannot be loaded"):
        load_tokenizer(tmp_path, None)


def test_text_that_cannot_be_encoded_is_a_user_error(tmp_path: Path) -> None:
    """The vocabulary has two characters and no token for others."""
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path, None)
    assert encode(ours, "a") == [0]
    with pytest.raises(ValueError, match=r"cannot encode a prompt \(Exception WordLevel error: Missing \[UNK\]"):
        encode(ours, "c")


def test_a_panic_of_the_library_is_a_user_error(tmp_path: Path) -> None:
    """The prefix of subwords is longer than the merges, which tokenizers then indexes beyond their end."""
    broken = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    broken["continuing_subword_prefix"] = "a long prefix"
    file = {"version": "1.0", "added_tokens": [], "model": broken}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=r"cannot be loaded \(PanicException"):
        load_tokenizer(tmp_path, None)


def test_threads_may_load_the_first_tokenizer_at_once() -> None:
    """No thread sees a partially imported transformers."""
    code = """
from concurrent.futures import ThreadPoolExecutor
from hetis.frontend.tokenizer import load_tokenizer
with ThreadPoolExecutor(6) as pool:
    assert all(pool.map(lambda _: load_tokenizer(None, None), range(6)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
