"""Scaled rope in every form of config.json: transformers' logits beyond the original length, vLLM's longest length."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hetis.core.model_spec import RopeSpec
from hetis.core.plan_sources import split_evenly
from hetis.core.sampling_params import SamplingParams
from hetis.models.families import read_model_spec
from hetis.models.layers import rope_frequencies, rope_table
from tests.checkpoints import greedy_reference, load_reference, make_checkpoint, reference_logits
from tests.engine.local_fleet import LocalFleet
from tests.models.reference import decode_all

ORIGINAL, FACTOR = 64, 4
LONGEST = ORIGINAL * FACTOR
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")

YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def tokens(count: int) -> list[int]:
    draw = random.Random(7)
    return [draw.randrange(331) for _ in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small rope_theta, so that the wavelengths lie around the original length."""
    directory = tmp_path_factory.mktemp("rope")
    make_checkpoint(directory, "llama2", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    return directory


def with_rope(checkpoint: Path, directory: Path, **keys: Any) -> Path:
    """The checkpoint with other rope keys in its config.json."""
    config = json.loads((checkpoint / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in _ROPE_KEYS}
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": ORIGINAL} | keys))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).symlink_to(checkpoint / name)
    return directory


@pytest.mark.parametrize(
    ("keys", "positions"),
    [
        ({}, ORIGINAL),
        ({"rope_scaling": None}, ORIGINAL),
        ({"rope_scaling": {}, "rope_theta": 500.0}, ORIGINAL),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 500}, ORIGINAL),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, ORIGINAL),
        ({"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 300.0}, ORIGINAL),
        ({"rope_parameters": None, "rope_theta": 500.0}, ORIGINAL),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, LONGEST),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4}, "rope_theta": 500.0}, LONGEST),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}, LONGEST),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 3.0}}, 2 * ORIGINAL),
        ({"rope_scaling": LLAMA3, "rope_theta": 500.0}, ORIGINAL),  # its original length is max_position_embeddings
        ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32, "rope_theta": 500.0}}, ORIGINAL),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 500.0}, ORIGINAL),
        ({"rope_scaling": {"type": "yarn"} | YARN, "rope_theta": 500.0}, LONGEST),
        ({"rope_scaling": {"rope_type": "yarn"} | YARN, "rope_theta": 500.0}, LONGEST),
        ({"rope_scaling": {"rope_type": "yarn", "type": "yarn"} | YARN}, LONGEST),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0} | YARN}, LONGEST),
        ({"rope_scaling": {"type": "yarn"} | YARN, "max_position_embeddings": LONGEST, "rope_theta": 500.0}, LONGEST),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 500.0}, LONGEST),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32},
            4 * 32,
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 3.0} | {"original_max_position_embeddings": 50}},
            150,
        ),
        ({"rope_scaling": {"type": "yarn"} | YARN | {"factor": None}, "max_position_embeddings": 192}, 192),
        ({"rope_scaling": {"type": "yarn", "attention_factor": 1.5} | YARN, "rope_theta": 500.0}, LONGEST),
        ({"rope_scaling": {"type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.2} | YARN}, LONGEST),
        ({"rope_scaling": {"type": "yarn", "mscale": 0.7} | YARN}, LONGEST),
        ({"rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.0} | YARN}, LONGEST),
        ({"rope_scaling": {"type": "yarn", "beta_fast": 3, "beta_slow": 0.5} | YARN, "rope_theta": 500.0}, LONGEST),
        ({"rope_scaling": {"type": "yarn", "beta_fast": None, "beta_slow": None} | YARN}, LONGEST),
        ({"rope_scaling": {"type": "yarn", "truncate": False, "beta_fast": 3.0} | YARN, "rope_theta": 500.0}, LONGEST),
        ({"rope_scaling": {"type": "yarn", "beta_fast": 1.0, "truncate": False} | YARN, "rope_theta": 500.0}, LONGEST),
    ],
)
def test_logits_beyond_the_original_length_equal_those_of_transformers(
    checkpoint: Path, tmp_path: Path, keys: dict[str, Any], positions: int
) -> None:
    directory = with_rope(checkpoint, tmp_path, **keys)
    spec = read_model_spec(directory)
    assert spec.max_position == positions
    prompt = tokens(positions)
    expected_TV = reference_logits(load_reference(directory), prompt)
    logits_TV = decode_all(spec, split_evenly("1+0", spec), directory, prompt)
    torch.testing.assert_close(logits_TV, expected_TV, rtol=0, atol=1e-4)


def test_attn_factor_multiplies_the_inferred_factor(checkpoint: Path, tmp_path: Path) -> None:
    """transformers ignores this key, so that the reference gets the product as attention_factor."""
    yarn = {"type": "yarn"} | YARN
    spec = read_model_spec(with_rope(checkpoint, tmp_path, rope_scaling=yarn | {"attn_factor": 0.8782488562869419}))
    assert spec.rope is not None
    assert spec.rope.attention_factor == pytest.approx(1.0, abs=1e-6)
    (tmp_path / "product").mkdir()
    product = with_rope(checkpoint, tmp_path / "product", rope_scaling=yarn | {"attention_factor": 1.0})
    logits_TV = decode_all(spec, split_evenly("1+0", spec), tmp_path, tokens(100))
    torch.testing.assert_close(logits_TV, reference_logits(load_reference(product), tokens(100)), rtol=0, atol=1e-4)
    both = yarn | {"attn_factor": 0.5, "attention_factor": 1.25}
    (tmp_path / "both").mkdir()
    spec = read_model_spec(with_rope(checkpoint, tmp_path / "both", rope_scaling=both))
    assert spec.rope is not None
    assert spec.rope.attention_factor == 1.25


def test_dynamic_rope_is_that_of_transformers_at_the_longest_length(checkpoint: Path, tmp_path: Path) -> None:
    """transformers computes a table for every length; hetis uses that of the longest sequence."""
    keys = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 500.0}
    directory = with_rope(checkpoint, tmp_path, **keys)
    spec = read_model_spec(directory)
    assert spec.max_position == LONGEST
    expected_TV = reference_logits(load_reference(directory), tokens(LONGEST))
    logits_TV = decode_all(spec, split_evenly("1+0", spec), directory, tokens(LONGEST))
    torch.testing.assert_close(logits_TV, expected_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_dynamic_rope_of_shorter_sequences_has_the_same_base(checkpoint: Path, tmp_path: Path, name: str) -> None:
    keys = {name: {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}}
    spec = read_model_spec(with_rope(checkpoint, tmp_path, **keys))
    (tmp_path / "plain").mkdir()
    base = 500.0 * (FACTOR * LONGEST / ORIGINAL - (FACTOR - 1)) ** (32 / 30)  # head_dim is 32
    plain = with_rope(checkpoint, tmp_path / "plain", rope_theta=base, max_position_embeddings=LONGEST)
    model = load_reference(plain)
    for count in (5, ORIGINAL, ORIGINAL + 1, 100):
        logits_TV = decode_all(spec, split_evenly("1+0", spec), tmp_path, tokens(count))
        expected_TV = reference_logits(model, tokens(count))
        torch.testing.assert_close(logits_TV, expected_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_fleet_decodes_past_the_original_length(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """Prompts below, across and beyond that length, with lanes on a worker; max_model_len follows from the rope."""
    directory = with_rope(checkpoint, tmp_path, rope_scaling={"type": kind} | YARN, rope_theta=500.0)
    model = load_reference(directory)
    prompts = [tokens(count) for count in (50, 61, 150)]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    with LocalFleet(directory, "1+1", dtype="float32", max_num_batched_tokens=70) as fleet:
        assert fleet.setup.max_model_len == LONGEST
        found = fleet.generate(prompts, params, check=True)
    for one, prompt in zip(found, prompts, strict=True):
        assert one.token_ids == greedy_reference(model, prompt, 24)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [4.0]}, ["type", "longrope"]),
        ({"type": "su", "factor": 4.0}, ["su", "remove rope_scaling"]),
        ({"type": "mrope", "mrope_section": [1]}, ["mrope"]),
        ({"rope_type": 3}, ["rope_scaling.rope_type is 3"]),
        ({"rope_type": "linear", "type": "yarn"} | YARN, ["linear", "yarn", "remove"]),
        ({"type": "linear"}, ["rope_scaling.factor is missing"]),
        ({"type": "dynamic", "factor": None}, ["rope_scaling.factor is missing"]),
        ({"type": "dynamic", "alpha": 1000.0}, ["rope_scaling.alpha", "1000"]),
        ({"type": "linear", "factor": "4"}, ['rope_scaling.factor is "4"', "number"]),
        ({"type": "linear", "factor": 0.5}, ["rope_scaling.factor is 0.5"]),
        ({"type": "linear", "factor": 1e9}, ["rope_scaling.factor is 1000000000.0"]),
        ({"type": "yarn", "original_max_position_embeddings": 65}, ["rope_scaling.factor is missing", "65", "64"]),
        ({"type": "yarn", "beta_fast": 1, "beta_slow": 2} | YARN, ["beta_fast is 1", "beta_slow 2"]),
        ({"type": "yarn", "truncate": "false"} | YARN, ['truncate is "false"']),
        ({"type": "yarn", "attention_factor": 0} | YARN, ["attention_factor is 0"]),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64.5}, ["64.5", "whole number"]),
        (LLAMA3 | {"low_freq_factor": None}, ["low_freq_factor is missing"]),
        (LLAMA3 | {"high_freq_factor": 1.0}, ["high_freq_factor is 1.0", "low_freq_factor 1.0"]),
        ({"rope_theta": 1.0}, ["rope_theta is 1.0"]),
        ({"rope_theta": "1e6"}, ['rope_scaling.rope_theta is "1e6"']),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        ({"full_attention": {"rope_type": "default"}}, ["differs by layer", "full_attention"]),
    ],
)
def test_unsupported_rope_is_refused(
    checkpoint: Path, tmp_path: Path, scaling: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as refused:
        read_model_spec(with_rope(checkpoint, tmp_path, rope_scaling=scaling))
    message = str(refused.value)
    assert all(word in message for word in [str(tmp_path / "config.json"), *words]), message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama3", {"low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("linear", {}),
        ("yarn", {}),
        ("yarn", {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False}),
    ],
)
@pytest.mark.parametrize(("head_dim", "theta", "original"), [(128, 500000.0, 8192), (64, 1e6, 32768), (80, 1e4, 2048)])
def test_scaled_frequencies_equal_those_of_transformers(
    kind: str, more: dict[str, Any], head_dim: int, theta: float, original: int
) -> None:
    parameters = {"rope_type": kind, "rope_theta": theta, "factor": 8.0, "original_max_position_embeddings": original}
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=parameters | more
    )
    expected, _ = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
    rope = RopeSpec(
        theta=theta,
        rotary_dim=head_dim,
        scaling=kind,  # type: ignore[arg-type]
        factor=8.0,
        original_max_position=original,
        **more,
    )
    torch.testing.assert_close(rope_frequencies(rope), expected, rtol=1e-6, atol=0)


def test_rope_table_holds_cosines_then_sines_times_the_attention_factor() -> None:
    table_PR = rope_table(RopeSpec(theta=10000.0, rotary_dim=32), 40, torch.device("cpu"))
    assert table_PR.shape == (40, 32)
    assert table_PR.dtype == torch.float32
    angle = torch.tensor(39 * 10000.0 ** (-2 * 5 / 32), dtype=torch.float64)
    assert table_PR[39, 5].item() == pytest.approx(angle.cos().item(), abs=1e-5)
    assert table_PR[39, 21].item() == pytest.approx(angle.sin().item(), abs=1e-5)
    scaled_PR = rope_table(RopeSpec(theta=10000.0, rotary_dim=32, attention_factor=1.25), 40, torch.device("cpu"))
    torch.testing.assert_close(scaled_PR, 1.25 * table_PR, rtol=1e-6, atol=0)
