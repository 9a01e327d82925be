"""Prompts in every form; everything else is refused with its position."""

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from hetis.core.sampling_params import SamplingParams
from hetis.frontend.prompts import read_params, read_prompts

IDS = [5, 6, 7]
ONE: list[tuple[Any, str | None, list[int] | None]] = [
    ("text", "text", None),
    ("", "", None),
    (IDS, None, IDS),
    (tuple(IDS), None, IDS),
    (range(5, 8), None, IDS),
    (deque(IDS), None, IDS),
    ([np.int64(5), np.uint8(6), 7], None, IDS),
    (np.array(IDS), None, IDS),
    (np.array(IDS, dtype=np.uint16)[::1], None, IDS),
    (torch.tensor(IDS), None, IDS),
    (torch.tensor(IDS, dtype=torch.int32), None, IDS),
    ({"prompt": "text"}, "text", None),
    ({"prompt_token_ids": IDS}, None, IDS),
    ({"prompt_token_ids": np.array(IDS)}, None, IDS),
    ({"prompt_token_ids": torch.tensor(IDS)}, None, IDS),
    ({"prompt_token_ids": []}, None, []),
    ({"prompt": "text", "prompt_token_ids": IDS}, "text", IDS),
    ({"prompt": None, "prompt_token_ids": IDS}, None, IDS),
]


@pytest.mark.parametrize(("prompt", "text", "ids"), ONE, ids=[repr(prompt) for prompt, _, _ in ONE])
def test_every_form_alone_and_in_a_list(prompt: Any, text: str | None, ids: list[int] | None) -> None:
    for prompts in (prompt, [prompt], ("a", prompt)):
        found = read_prompts(prompts)[-1]
        assert (found.text, found.token_ids) == (text, ids)
        assert ids is None or all(type(token) is int for token in found.token_ids or [])


def test_all_forms_together_keep_their_order() -> None:
    found = read_prompts([prompt for prompt, _, _ in ONE])
    assert [(prompt.text, prompt.token_ids) for prompt in found] == [(text, ids) for _, text, ids in ONE]
    assert read_prompts([]) == []


REFUSED: list[tuple[Any, str]] = [
    (None, "prompt 1 is None; give text"),
    (b"bytes", "prompt 1 is a bytes"),
    (bytearray(b"x"), "prompt 1 is a bytearray"),
    (memoryview(b"x"), "prompt 1 is a memoryview"),
    (5, "prompt 1 is an int"),
    (5.0, "prompt 1 is a float"),
    ({5, 6}, "prompt 1 is a set"),
    ((token for token in IDS), "prompt 1 is a generator"),
    (iter(IDS), "prompt 1 is a list_iterator"),
    (object(), "prompt 1 is an object"),
    ([5, True], "prompt 1 has True at position 1"),
    ([5, 6.0], "prompt 1 has 6.0 at position 1"),
    ([5, None], "prompt 1 has None at position 1"),
    ([5, "6"], "prompt 1 has '6' at position 1"),
    ([[5], [6]], r"prompt 1 has \[5\] at position 0"),
    (np.array([[5, 6]]), r"prompt 1 is an array of shape \(1, 2\)"),
    (np.array(5), r"prompt 1 is an array of shape \(\)"),
    (np.array([5.0]), "prompt 1 has 5.0 at position 0"),
    (np.array([True]), "prompt 1 has True at position 0"),
    (torch.tensor([[5]]), r"prompt 1 is an array of shape \(1, 1\)"),
    (torch.tensor([5.0]), "prompt 1 has 5.0 at position 0"),
    (torch.tensor(5), r"prompt 1 is an array of shape \(\)"),
    ("a\ud800b", "prompt 1 is not valid Unicode .lone surrogate at position 1"),
    ({"prompt": "\udfff"}, "prompt 1 is not valid Unicode .lone surrogate at position 0"),
    ({"prompt": None}, "prompt 1 has None as 'prompt'"),
    ({"prompt": 5}, "prompt 1 has an int as 'prompt'"),
    ({"prompt_token_ids": "text"}, "'prompt_token_ids' of prompt 1 is a str"),
    ({"prompt_token_ids": None}, "'prompt_token_ids' of prompt 1 is None"),
    ({"prompt_token_ids": [True]}, "'prompt_token_ids' of prompt 1 has True at position 0"),
    ({"prompt": "x", "multi_modal_data": {}}, "prompt 1 is a dict with the key 'multi_modal_data'; known: prompt, "),
    ({5: "x"}, "prompt 1 is a dict with the key 5"),
    ({}, "prompt 1 is a dict with no keys"),
]


@pytest.mark.parametrize(("prompt", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_everything_else_is_refused_by_position(prompt: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        read_prompts(["fine", prompt])


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, "prompts is None"),
        (b"x", "prompts is a bytes"),
        (5, "prompts is an int"),
        ({"a", "b"}, "prompts is a set"),
        ((prompt for prompt in ["a"]), "prompts is a generator"),
        ([True, False], "prompt 0 has True at position 0"),
        ([5, [6]], r"prompt 0 has \[6\] at position 1"),
        ({"prompts": ["a"]}, "prompt 0 is a dict with the key 'prompts'"),
        (np.array([[5, 6], [7, 8]]), r"prompt 0 is an array of shape \(2, 2\)"),
        (np.array(["a", "b"]), "prompt 0 has 'a' at position 0"),
    ],
)
def test_other_values_than_lists_of_prompts_are_refused(prompts: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        read_prompts(prompts)


def test_parameters() -> None:
    one, two = SamplingParams(n=2), SamplingParams(n=3)
    assert read_params(None, 2) == [SamplingParams()] * 2
    assert read_params(one, 2) == [one, one]
    assert read_params((one, two), 2) == [one, two]
    for wrong, words in (
        ({"n": 2}, r"^sampling_params is a dict; give SamplingParams\(...\)"),
        ([one, {"n": 2}], r"^sampling_params 1 is a dict; give SamplingParams\(...\)"),
        ([one, None], "^sampling_params 1 is None"),
        ("n=2", "^sampling_params is a str"),
        ([one], "^2 prompts but 1 sampling parameters"),
        ([one, two, one], "^2 prompts but 3 sampling parameters"),
    ):
        with pytest.raises(ValueError, match=words):
            read_params(wrong, 2)  # type: ignore[arg-type]
