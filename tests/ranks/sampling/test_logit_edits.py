"""Penalties, biases and bans against loops over all tokens."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hetis.core.sampling_params import SamplingParams
from hetis.ranks.sampling.logit_edits import LogitEdits
from hetis.ranks.sampling.sampler import Sampler
from tests.ranks.sampling.slow_sampler import (
    EOS,
    MIXED,
    assert_drawn_from,
    random_logits,
    sample,
    sampler_for,
    tokens_at_many_positions,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_penalties(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    penalised = []
    for token, logit in enumerate(logits):
        value = logit
        if token in prompt or token in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token)
        value -= params.presence_penalty * (token in output)
        penalised.append(value)
    return penalised


def edits_for(num_slots: int, size: int, device: str) -> LogitEdits:
    return LogitEdits(num_slots, size, [EOS], torch.device(device))


def edited(edits: LogitEdits, logits: Tensor, slots: list[int], positions: list[int]) -> Tensor:
    edited = edits.apply(logits, np.array(slots), np.array(positions))
    return (logits if edited is None else edited).cpu()


def test_penalties_equal_a_loop_over_all_tokens_while_sequences_start_grow_and_end(device: str) -> None:
    random, size, num_slots = np.random.default_rng(0), 40, 5
    edits = edits_for(num_slots, size, device)
    live: dict[int, tuple[SamplingParams, list[int], int]] = {}  # slot: params, tokens, prompt_len
    num_observed: dict[int, int] = {}
    for step in range(40):
        for slot in range(num_slots):
            if slot in live and random.random() < 0.1:
                edits.remove(slot)
                del live[slot]
            if slot not in live and random.random() < 0.5:
                penalties = {
                    "repetition_penalty": float(random.choice([1.0, 1.5, 0.5])),
                    "frequency_penalty": float(random.choice([0.0, 0.7, -0.3])),
                    "presence_penalty": float(random.choice([0.0, 1.1])),
                }
                prompt_len = int(random.integers(1, 30))
                # a preempted sequence is recomputed with its output tokens
                tokens = random.integers(0, size, prompt_len + int(random.integers(0, 5))).tolist()
                live[slot], num_observed[slot] = (SamplingParams(**penalties), tokens, prompt_len), 0
                edits.add(slot, live[slot][0], prompt_len)
        chunks = []  # prompts in chunks, output tokens one by one
        for slot, (_, tokens, _) in live.items():
            start, stop = num_observed[slot], min(len(tokens), num_observed[slot] + int(random.integers(1, 12)))
            chunks += [(slot, tokens[position], position) for position in range(start, stop)]
            num_observed[slot] = stop
        if chunks:
            slot_T, token_T, position_T = np.array(chunks, dtype=np.int32).T
            edits.observe(slot_T, token_T, position_T)
        ready = [slot for slot, (_, tokens, _) in live.items() if num_observed[slot] == len(tokens)]
        logits = random_logits(len(ready), size, seed=step)
        if ready:
            found = edited(edits, logits.to(device), ready, [len(live[slot][1]) for slot in ready])
            for row, slot in enumerate(ready):
                params, tokens, prompt_len = live[slot]
                expected = slow_penalties(logits[row].tolist(), tokens[:prompt_len], tokens[prompt_len:], params)
                torch.testing.assert_close(found[row], torch.tensor(expected), rtol=1e-6, atol=1e-6)
        for slot in ready:
            live[slot][1].append(int(random.integers(0, size)))


def test_biases_are_added_before_temperature(device: str) -> None:
    logits_V, bias = random_logits(1, 100)[0], {0: 3.0, 99: -2.0, 50: 100.0}
    params = SamplingParams(temperature=0.5, logit_bias=bias)
    biased_V = logits_V + torch.tensor([bias.get(token, 0.0) for token in range(100)])
    assert_drawn_from(tokens_at_many_positions(logits_V, params, 40, device), biased_V, params)


def test_end_tokens_are_banned_until_min_tokens(device: str) -> None:
    logits = torch.zeros(1, 10)
    logits[0, [EOS, 7, 5]] = torch.tensor([9.0, 8.0, 1.0])
    params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=[7], logit_bias={7: 50})
    sampler = sampler_for([params], 10, device, prompt_len=4)
    found = [int(sample(sampler, logits, [0], [4 + i], device).token_R[0]) for i in range(5)]
    assert found == [5, 5, 5, 7, 7]


def test_a_slot_keeps_nothing_of_its_previous_sequence(device: str) -> None:
    logits = random_logits(1, 50).to(device)
    edits = edits_for(1, 50, device)

    def begin(params: SamplingParams) -> None:
        """Puts another sequence, of six prompt tokens, into the only slot."""
        edits.remove(0)
        edits.add(0, params, 6)
        edits.observe(np.zeros(6, dtype=np.int32), np.arange(6, dtype=np.int32) * 7, np.arange(6))

    begin(MIXED[6])
    assert not torch.equal(edited(edits, logits, [0], [6]), logits.cpu())
    begin(SamplingParams(presence_penalty=1.0))
    assert torch.equal(edited(edits, logits, [0], [6]), logits.cpu()), "presence counts output only"
    begin(SamplingParams())
    assert edits.apply(logits, np.zeros(1, dtype=np.int32), np.array([6])) is None, "nothing is copied"


def test_end_tokens_beyond_the_vocabulary_ban_nothing(device: str) -> None:
    """Ids of another model's generation_config.json are no tokens, and -1 does not mean the last one."""
    sampler = Sampler(1, 8, eos_token_ids=[EOS, 8, 128_009, -1], device=device)
    sampler.add(0, SamplingParams(temperature=0, min_tokens=2), 4, 0)
    logits = torch.arange(8.0).unsqueeze(0)
    assert sample(sampler, logits, [0], [4], device).token_R.tolist() == [7]
    logits[0, EOS] = 100
    assert sample(sampler, logits, [0], [4], device).token_R.tolist() == [7]
