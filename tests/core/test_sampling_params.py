"""Sampling parameters: default, accepted, normalised and refused values of every field."""

from math import inf, nan
from typing import Any

import msgspec
import numpy as np
import pytest

from hetis.core.sampling_params import SamplingParams

DEFAULTS = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "seed": None,
    "stop": (),
    "stop_token_ids": (),
    "max_tokens": 16,
    "min_tokens": 0,
    "ignore_eos": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "logit_bias": {},
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "detokenize": True,
}

ACCEPTED = [  # field, given, kept
    ("n", 1, 1),
    ("n", 16_384, 16_384),
    ("temperature", 0, 0.0),
    ("temperature", 2, 2.0),
    ("temperature", 9e-6, 9e-6),
    ("temperature", 1e-5, 0.01),
    ("temperature", 0.009, 0.01),
    ("temperature", np.float32(0.5), 0.5),
    ("top_p", 1, 1.0),
    ("top_p", 1e-9, 1e-9),
    ("top_k", -1, 0),
    ("top_k", 0, 0),
    ("top_k", 1, 1),
    ("top_k", 10**6, 10**6),
    ("min_p", 0, 0.0),
    ("min_p", 1, 1.0),
    ("presence_penalty", -2, -2.0),
    ("presence_penalty", 2.0, 2.0),
    ("frequency_penalty", -2, -2.0),
    ("frequency_penalty", 2.0, 2.0),
    ("repetition_penalty", 1e-3, 1e-3),
    ("repetition_penalty", 100, 100.0),
    ("seed", None, None),
    ("seed", -1, None),
    ("seed", 0, 0),
    ("seed", -(2**63), -(2**63)),
    ("seed", 2**63 - 1, 2**63 - 1),
    ("seed", np.int64(5), 5),
    ("stop", "end", ("end",)),
    ("stop", [*"abcdefgh", "a"], (*"abcdefgh",)),
    ("stop", None, ()),
    ("stop", [], ()),
    ("stop_token_ids", [3, 1, 3], (3, 1)),
    ("stop_token_ids", (0,), (0,)),
    ("stop_token_ids", None, ()),
    ("max_tokens", 1, 1),
    ("max_tokens", None, None),
    ("min_tokens", 0, 0),
    ("min_tokens", 16, 16),
    ("ignore_eos", True, True),
    ("logprobs", 0, 0),
    ("logprobs", -1, -1),
    ("logprobs", None, None),
    ("prompt_logprobs", 0, 0),
    ("prompt_logprobs", -1, -1),
    ("logit_bias", {5: 3, "7": -2.5}, {5: 3.0, 7: -2.5}),
    ("logit_bias", {0: 1e9, 1: -inf}, {0: 100.0, 1: -100.0}),
    ("logit_bias", None, {}),
    ("skip_special_tokens", False, False),
    ("spaces_between_special_tokens", False, False),
    ("include_stop_str_in_output", True, True),
    ("detokenize", False, False),
]

REFUSED = [  # field, given, words of the message
    ("n", 0, "from 1 to 16384"),
    ("n", 16_385, "from 1 to 16384"),
    ("n", 1.5, "integer"),
    ("n", None, "integer"),
    ("temperature", -0.1, "from 0"),
    ("temperature", 2.1, "to 2"),
    ("temperature", nan, "to 2"),
    ("temperature", inf, "to 2"),
    ("temperature", "1", "number"),
    ("temperature", None, "number"),
    ("top_p", 0, "above 0 and at most 1"),
    ("top_p", 1.01, "above 0 and at most 1"),
    ("top_p", nan, "above 0 and at most 1"),
    ("top_k", -2, "or -1 (off)"),
    ("top_k", 2.0, "integer"),
    ("min_p", -0.1, "from 0 to 1"),
    ("min_p", 1.1, "from 0 to 1"),
    ("presence_penalty", -2.1, "from -2 to 2"),
    ("presence_penalty", 2.1, "from -2 to 2"),
    ("frequency_penalty", -2.1, "from -2 to 2"),
    ("frequency_penalty", 2.1, "from -2 to 2"),
    ("repetition_penalty", 0, "above 0"),
    ("repetition_penalty", inf, "finite"),
    ("repetition_penalty", 10**400, "finite"),
    ("seed", 2**63, "64-bit"),
    ("seed", -(2**63) - 1, "64-bit"),
    ("seed", 1.0, "integer"),
    ("stop", "", "not empty"),
    ("stop", ["a", ""], "not empty"),
    ("stop", ["a", 1], "strings"),
    ("stop", 5, "string"),
    ("stop", ["a", "\ud800"], "valid Unicode"),
    ("stop_token_ids", [-1], "0 or more"),
    ("stop_token_ids", ["a"], "token ids"),
    ("stop_token_ids", 5, "list"),
    ("stop_token_ids", [True], "token ids"),
    ("max_tokens", 0, "1 or more"),
    ("max_tokens", True, "integer"),
    ("max_tokens", 2**63, "integer"),
    ("min_tokens", -1, "max_tokens"),
    ("min_tokens", 17, "max_tokens, which is 16"),
    ("ignore_eos", 1, "True or False"),
    ("logprobs", -2, "0 or more"),
    ("logprobs", True, "integer"),
    ("prompt_logprobs", -2, "0 or more"),
    ("logit_bias", {-1: 1.0}, "token ids"),
    ("logit_bias", {"x": 1.0}, "token ids"),
    ("logit_bias", {1: nan}, "number"),
    ("logit_bias", {1: "2"}, "number"),
    ("logit_bias", [1], "mapping"),
    ("skip_special_tokens", None, "True or False"),
    ("spaces_between_special_tokens", 0, "True or False"),
    ("include_stop_str_in_output", "no", "True or False"),
    ("detokenize", "yes", "True or False"),
]


def test_defaults() -> None:
    assert msgspec.structs.asdict(SamplingParams()) == DEFAULTS


@pytest.mark.parametrize(("field", "given", "kept"), ACCEPTED)
def test_accepted(field: str, given: Any, kept: Any) -> None:
    params = SamplingParams(**{field: given})
    assert getattr(params, field) == kept
    assert type(getattr(params, field)) is type(kept)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(("field", "given", "allowed"), REFUSED)
def test_refused_by_name_with_value_and_range(field: str, given: Any, allowed: str) -> None:
    with pytest.raises(ValueError) as refusal:
        SamplingParams(**{field: given})
    message = str(refusal.value)
    assert message.startswith(field)
    assert "but must be" in message
    assert allowed in message


def test_every_field_has_an_accepted_row() -> None:
    assert {field for field, *_ in ACCEPTED} == set(DEFAULTS) == set(SamplingParams.__struct_fields__)
    assert {field for field, *_ in REFUSED} == set(DEFAULTS)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"n": 2, "temperature": 0}, "n"),
        ({"stop": "x", "detokenize": False}, "stop"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ],
)
def test_fields_that_exclude_each_other(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is"):
        SamplingParams(**fields)


def test_min_tokens_has_no_limit_without_max_tokens() -> None:
    assert SamplingParams(min_tokens=10**6, max_tokens=None).min_tokens == 10**6


@pytest.mark.parametrize(
    ("fields", "max_logprobs", "name"),
    [
        ({"stop_token_ids": [99]}, 20, None),
        ({"stop_token_ids": [5, 100]}, 20, "stop_token_ids"),
        ({"logit_bias": {99: 1}}, 20, None),
        ({"logit_bias": {100: 1}}, 20, "logit_bias"),
        ({"logprobs": 20}, 20, None),
        ({"logprobs": 21}, 20, "logprobs"),
        ({"logprobs": -1}, 20, "logprobs"),
        ({"logprobs": -1}, -1, None),
        ({"logprobs": -1}, 100, None),
        ({"prompt_logprobs": 21}, 20, "prompt_logprobs"),
        ({"prompt_logprobs": 50}, -1, None),
    ],
)
def test_limits_of_the_model(fields: dict[str, Any], max_logprobs: int, name: str | None) -> None:
    params = SamplingParams(**fields)
    if name is None:
        params.validate_for(100, max_logprobs)
    else:
        with pytest.raises(ValueError, match=f"^{name} is"):
            params.validate_for(100, max_logprobs)


@pytest.mark.parametrize("name", ["best_of", "bad_words", "allowed_token_ids", "temprature"])
def test_unknown_fields_are_refused_with_the_names_of_all(name: str) -> None:
    with pytest.raises(ValueError, match=f"^SamplingParams has no {name}; known: n, temperature, .*, detokenize.$"):
        SamplingParams(**{"n": 2, name: 1})
    with pytest.raises(ValueError, match="keyword arguments only"):
        SamplingParams(0.8)  # type: ignore[misc]


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        SamplingParams().n = 2  # type: ignore[misc]


def test_every_completion_has_its_own_seed_and_the_first_scores_the_prompt() -> None:
    for seed in (7, -2, 2**63 - 1, -(2**63)):
        params = [SamplingParams(n=3, seed=seed, prompt_logprobs=1).for_completion(index) for index in range(3)]
        assert params[0].seed == seed
        assert len({p.seed for p in params}) == 3
        assert None not in {p.seed for p in params}
        assert [p.n for p in params] == [1, 1, 1]
        assert [p.prompt_logprobs for p in params] == [1, None, None]
    assert SamplingParams(n=2).for_completion(1).seed is None
