"""Malformed files of a checkpoint: every error is one sentence that names the file and the key."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetis.core.model_spec import ModelSpec
from hetis.models.families import read_model_spec
from hetis.models.json_files import read_object
from tests.models.test_families import LLAMA_31, MISTRAL, OPT, QWEN_25

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
_LAYERS = ["full_attention", "sliding_attention"] * 12
QWEN_3 = QWEN_25 | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
CONFIGS: list[dict[str, Any]] = [
    LLAMA_31,
    LLAMA_31 | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    LLAMA_31 | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    QWEN_25 | {"rope_scaling": _YARN | {"beta_fast": 32, "truncate": True, "attention_factor": 1.0}},
    QWEN_3 | {"rope_parameters": _YARN | {"rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 1.0}},
    QWEN_25 | {"use_sliding_window": True, "layer_types": _LAYERS},
    MISTRAL | {"head_dim": 128, "num_key_value_heads": 8, "dtype": "bfloat16"},
    OPT | {"enable_bias": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
]

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2, 3, 7, 48, 2**31, 2**63, -(2**63) - 1, 10**40, "", "32", "false", "1e-05", "yarn"])
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["\ud800", "x" * 500, "linear", "dynamic", "llama3", "default"])
)
VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
_DELETED = object()


@st.composite
def mutated(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """A config with one value replaced or deleted, possibly inside its rope, and the key of that value."""
    config = json.loads(json.dumps(draw(st.sampled_from(CONFIGS))))
    target = config
    key = draw(st.sampled_from(sorted(config)))
    if isinstance(config[key], dict) and draw(st.booleans()):
        target, key = config[key], draw(st.sampled_from(sorted(config[key])))
    value = draw(st.just(_DELETED) | VALUES)
    if value is _DELETED:
        del target[key]
    else:
        target[key] = value
    return config, key


@settings(
    max_examples=600, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mutated())
def test_any_value_in_a_config_gives_a_spec_or_an_error_of_one_sentence(
    tmp_path: Path, case: tuple[dict[str, Any], str]
) -> None:
    config, key = case
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        spec = read_model_spec(tmp_path)
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{tmp_path / 'config.json'}: ")
        assert key in message, message
        assert message.endswith(".")
        assert len(message) < 600
        message.encode("utf-8")  # it can be printed
        assert message.isprintable(), message
    else:
        assert msgspec.json.decode(msgspec.json.encode(spec), type=ModelSpec) == spec  # as the driver reads it


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b'{"model_type": ', "cannot be read"),
        (b"\xff\xfe{}", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"text"', "not a JSON object"),
    ],
)
def test_files_without_an_object_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        read_model_spec(tmp_path)
    assert str(refused.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(refused.value)


def test_missing_files_and_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json does not exist; give a directory"):
        read_model_spec(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config.json cannot be read \(Is a directory\)"):
        read_model_spec(tmp_path)


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "config.json") == {"a": 1}


def test_deeply_nested_values_are_refused_in_a_sentence(tmp_path: Path) -> None:
    for depth in (100, 400, 900):
        nested: Any = json.dumps(LLAMA_31)[:-1] + ', "head_dim": ' + "[" * depth + "]" * depth + "}"
        (tmp_path / "config.json").write_text(nested)
        with pytest.raises(ValueError, match=r"head_dim is \[\[|cannot be read"):
            read_model_spec(tmp_path)
