"""Randomly damaged files of a checkpoint are read, or refused in one sentence. The damage is seeded."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hetis.core.config import EngineConfig
from hetis.frontend.tokenizer import encode, load_tokenizer
from hetis.launch.checks import end_of_sequence_ids, plan_for
from hetis.models.hub import PACKAGED
from hetis.models.weight_files import with_own_head

TRIES = 60  # for each file
VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 64, 2**31, 2**63, 10**400, 1e308, -0.0, 0.5, "", "x", "\ud800", "a\nb", "yarn", "dynamic",
    [], [[]], [None], [1, 2], {}, {"a": 1}, {"rope_type": "yarn", "factor": []}, {"content": 1},
]  # fmt: skip
KEYS = [
    "rope_scaling", "rope_parameters", "auto_map", "quantization_config", "eos_token_id", "eos_token", "layer_types",
    "added_tokens_decoder", "model_max_length", "extra_special_tokens", "chat_template", "bos_token", "head_dim",
]  # fmt: skip
BYTES = [b"", b"\x00" * 100, b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{\x00}\x00", b"null", b'{"a": NaN}']


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(shutil.copytree(PACKAGED, tmp_path_factory.mktemp("hostile") / "model"))
    (directory / "generation_config.json").write_text('{"eos_token_id": 0}')
    return directory


def places(value: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in JSON down to `depth`."""
    if isinstance(value, dict | list) and depth:
        for key in [*value][:40] if isinstance(value, dict) else range(min(len(value), 10)):
            yield value, key
            yield from places(value[key], depth - 1)


def changed_json(content: bytes, draw: random.Random) -> bytes:
    value = json.loads(content)
    if draw.random() < 0.3:
        value[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
    else:
        container, key = draw.choice([*places(value, draw.randint(1, 4))])
        container[key] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(value).encode()


def changed(name: str, content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.15:
        return draw.choice([*BYTES, content[: draw.randrange(len(content))], b"\xef\xbb\xbf" + content])
    if not name.endswith(".safetensors"):
        return changed_json(content, draw)
    length, rest = int.from_bytes(content[:8], "little"), content[8:]
    header, values = rest[:length], rest[length:]
    if draw.random() < 0.5:
        header = changed_json(header, draw)
        length = len(header)
    else:
        length = draw.choice([0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + header + values


def read_all(directory: Path) -> None:
    """Reads what front end and rank 0 read before weights are loaded."""
    config = EngineConfig(model=str(directory), device="cpu", plan="2+1")
    _, spec, _ = plan_for(config)
    with_own_head(spec, directory)
    assert all(0 <= token < spec.vocab_size for token in end_of_sequence_ids(config, directory, spec.vocab_size))
    tokenizer = load_tokenizer(directory, None)
    if tokenizer is not None:
        encode(tokenizer, "hello world")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_it_is_read_or_refused_in_one_sentence(model: Path, name: str) -> None:
    draw, content = random.Random(name), (model / name).read_bytes()
    refusals: list[str] = []
    try:
        for _ in range(TRIES):
            (model / name).write_bytes(changed(name, content, draw))
            try:
                read_all(model)
            except ValueError as error:
                refusals.append(str(error))
    finally:
        (model / name).write_bytes(content)
    read_all(model)
    assert refusals
    for refusal in refusals:
        assert "\n" not in refusal
        assert refusal.startswith(("the tokenizer", str(model)))
