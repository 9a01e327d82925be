"""Log-probabilities of drawn tokens and of prompts against softmax of torch and a sort."""

from math import log

import numpy as np
import pytest
import torch
from torch import Tensor

from hetis.core.sampling_params import SamplingParams
from hetis.core.token_logprobs import TokenLogprobs
from hetis.ranks.sampling import scoring
from hetis.ranks.sampling.sampler import Sampler
from tests.ranks.sampling.slow_sampler import random_logits, sample, sampler_for

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_logprobs(found: TokenLogprobs, logits_V: Tensor, token: int, count: int, raw: bool = False) -> None:
    values = logits_V.float() if raw else logits_V.double().log_softmax(-1).float()
    order = sorted(range(len(values)), key=lambda i: (-float(logits_V[i]), i))
    entries = found.ranked()
    assert [i for i, _, _ in entries] == [token, *order[:count]]
    torch.testing.assert_close(
        torch.tensor([value for _, value, _ in entries]), values[[token, *order[:count]]], rtol=1e-6, atol=2e-6
    )
    assert [rank for _, _, rank in entries[1:]] == list(range(1, count + 1))
    assert found.token_rank == 1 + int((logits_V > logits_V[token]).sum())


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits"])
@pytest.mark.parametrize("size", [5, 64, 1000, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(size: int, dtype: torch.dtype, mode: str, device: str) -> None:
    counts = [None, 0, 1, 5, -1]
    params = [SamplingParams(logprobs=count, temperature=2, logit_bias={1: 30}, top_k=3) for count in counts]
    logits = random_logits(len(counts), size).to(dtype)
    sampler = Sampler(len(counts), size, eos_token_ids=[], logprobs_mode=mode, device=device)
    for slot, one in enumerate(params):
        sampler.add(slot, one, 4, slot)
    sampled = sample(sampler, logits, list(range(len(counts))), [4] * len(counts), device)
    assert sampled.logprobs[0] is None
    for row, count in enumerate(counts[1:], start=1):
        found = sampled.logprobs[row]
        assert found is not None
        wanted = size if count == -1 else min(count, size)
        assert_logprobs(found, logits[row], int(sampled.token_R[row]), wanted, mode == "raw_logits")


@pytest.mark.parametrize("count", [0, 3, -1])
def test_prompt_logprobs_in_blocks_of_rows(count: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    size, num_positions = 300, 17
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 5 * size)
    logits = random_logits(num_positions, size).bfloat16()
    following = np.arange(num_positions, dtype=np.int32) * 13 % size
    sampler = sampler_for([SamplingParams(prompt_logprobs=count)], size, device)
    found = sampler.score_prompt(logits.to(device), following, 0)
    assert len(found) == num_positions
    for position, one in enumerate(found):
        assert_logprobs(one, logits[position], int(following[position]), size if count == -1 else count)


def test_sum_of_logprobs_of_greedy_tokens_equals_that_of_a_softmax() -> None:
    logits = random_logits(8, 100)
    sampler = sampler_for([SamplingParams(temperature=0, logprobs=0)] * 8, 100)
    sampled = sample(sampler, logits, list(range(8)), [4] * 8)
    total = sum(one.ranked()[0][1] for one in sampled.logprobs if one is not None)
    assert total == pytest.approx(sum(log(row.softmax(-1).max()) for row in logits), abs=1e-4)
