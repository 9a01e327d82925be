"""A slow sampler that takes one row at a time, sorts and adds in float64, and helpers of tests of the sampler."""

from math import exp

import numpy as np
import torch
from torch import Tensor

from hetis.core.sampling_params import SamplingParams
from hetis.ranks.sampling.sampler import Sampled, Sampler

EOS = 3
MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(top_k=5),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(min_p=0.1),
    SamplingParams(top_k=40, top_p=0.95, min_p=0.01),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.5),
    SamplingParams(temperature=0, repetition_penalty=0.7),
    SamplingParams(logit_bias={1: 5.0, 700: -100.0}, min_tokens=10, stop_token_ids=[7]),
    SamplingParams(logprobs=3, top_p=0.5),
    SamplingParams(logprobs=-1, temperature=0),
]


def random_logits(rows: int, size: int, spread: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def sampler_for(params: list[SamplingParams], size: int, device: str = "cpu", prompt_len: int = 4) -> Sampler:
    """Slot i has params[i] and seed 100 + i."""
    sampler = Sampler(len(params), size, eos_token_ids=[EOS], device=device)
    for slot, one in enumerate(params):
        sampler.add(slot, one, prompt_len, 100 + slot)
    return sampler


def sample(sampler: Sampler, logits: Tensor, slots: list[int], positions: list[int], device: str = "cpu") -> Sampled:
    return sampler.sample(logits.to(device), np.array(slots, dtype=np.int32), np.array(positions))


def tokens_at_many_positions(logits_V: Tensor, params: SamplingParams, count: int, device: str = "cpu") -> list[int]:
    """One row drawn at `count` positions by the sequence in slot 0, as one batch."""
    sampler = sampler_for([params], len(logits_V), device)
    positions = list(range(4, 4 + count))
    return sample(sampler, logits_V.expand(count, -1), [0] * count, positions, device).token_R.tolist()


def observe_prompts(sampler: Sampler, count: int, length: int, size: int) -> None:
    slots, positions = np.repeat(np.arange(count), length), np.tile(np.arange(length), count)
    sampler.observe(slots.astype(np.int32), ((slots * 31 + positions * 7) % size).astype(np.int32), positions)


def slow_probabilities(logits: list[float], params: SamplingParams) -> np.ndarray:
    """Softmax with temperature, then min_p, top_k and top_p on sorted lists; ties with the last token kept are kept."""
    best = max(logits)
    weight = [exp((x - best) / params.temperature) for x in logits]
    kept = [i for i, w in enumerate(weight) if w >= params.min_p]
    if params.top_k:
        floor = sorted(logits, reverse=True)[min(params.top_k, len(logits)) - 1]
        kept = [i for i in kept if logits[i] >= floor]
    total, reached, floor = sum(weight[i] for i in kept), 0.0, best
    for i in sorted(kept, key=lambda i: -logits[i]):
        floor, reached = logits[i], reached + weight[i]
        if reached >= params.top_p * total * (1 - 1e-12):
            break
    probabilities = np.zeros(len(logits))
    for i in kept:
        if logits[i] >= floor:
            probabilities[i] = weight[i]
    return probabilities / probabilities.sum()


def slow_uniform(seed: int, index: int) -> float:
    mask = 2**64 - 1

    def mixed(bits: int) -> int:
        bits = (bits + 0x9E3779B97F4A7C15) & mask
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
        return bits ^ (bits >> 31)

    return (mixed((mixed(seed & mask) + index * 0x9E3779B97F4A7C15) & mask) >> 11) / 2**53


def assert_drawn_from(tokens: list[int], logits_V: Tensor, params: SamplingParams, seed: int = 100) -> None:
    """Asserts that each uniform number is in the interval of its token in the cumulative distribution."""
    probabilities = slow_probabilities(logits_V.tolist(), params)
    ends = probabilities.cumsum()
    for index, token in enumerate(tokens):
        uniform = slow_uniform(seed, index)
        assert probabilities[token] > 0
        assert ends[token] - probabilities[token] - 1e-6 <= uniform <= ends[token] + 1e-6
