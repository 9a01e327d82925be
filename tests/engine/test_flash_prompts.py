"""Prompts computed by flash-attn give the tokens of transformers: whole prompts, chunks and mixtures."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import hetis.ranks.primary
from hetis.core.sampling_params import SamplingParams
from hetis_kernels.flash_prefill import load_flash
from tests.checkpoints import greedy_reference, load_reference, make_checkpoint
from tests.engine.local_fleet import LocalFleet
from tests.engine.test_parity import LENGTHS, prompts
from tests.flash_attn_stand_in import FlashAttention, install

PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], FlashAttention]]:
    """Installs the stand-in, also for CPUs and float32; call it after transformers has looked for the package."""
    load_flash.cache_clear()
    monkeypatch.setattr(hetis.ranks.primary, "flash_serves", lambda *of: True)
    yield partial(install, monkeypatch)
    load_flash.cache_clear()


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_tokens_equal_transformers(family: str, flash: Callable[[], FlashAttention], tmp_path: Path) -> None:
    """Steps of 48 tokens have first and later chunks of prompts. Mistral has a sliding window."""
    directory = make_checkpoint(tmp_path, family)
    model = load_reference(directory)
    expected = [greedy_reference(model, prompt, PARAMS.max_tokens) for prompt in prompts()]
    attention = flash()
    with LocalFleet(directory, "1+1", dispatch="even", max_num_batched_tokens=48) as fleet:
        found = fleet.generate(prompts(), PARAMS, check=True)
        num_layers = fleet.setup.spec.num_layers
    assert [one.token_ids for one in found] == expected
    # the first chunk of each prompt, in every layer
    assert sum(attention.prompts_of_calls) == num_layers * len(LENGTHS)
