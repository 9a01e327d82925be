"""The sampler against a slow one that takes a row at a time, sorts, and adds up in float64."""

from collections.abc import Iterator
from math import exp, log

import numpy as np
import pytest
import torch
from torch import Tensor

from hetis.core.sampled import TokenLogprobs
from hetis.core.sampling_params import SamplingParams
from hetis.workers import draw, scoring, vocabulary
from hetis.workers.logit_edits import LogitEdits
from hetis.workers.sampler import Sampled, Sampler

EOS = 3
SIZES = [1, 5, 64, 65, 1000, 3001]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


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


# --- the slow sampler -------------------------------------------------------------------------------------------------


def slow_probabilities(logits: list[float], params: SamplingParams) -> np.ndarray:
    """Softmax with temperature, then min_p, top_k and top_p on sorted lists; tokens that tie with the last one stay."""
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
    """Each token is the one in whose interval of the cumulated distribution its uniform number falls."""
    probabilities = slow_probabilities(logits_V.tolist(), params)
    ends = probabilities.cumsum()
    for index, token in enumerate(tokens):
        uniform = slow_uniform(seed, index)
        assert probabilities[token] > 0
        assert ends[token] - probabilities[token] - 1e-6 <= uniform <= ends[token] + 1e-6


# --- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_best(size: int, dtype: torch.dtype, device: str) -> None:
    logits = random_logits(4, size).to(dtype)
    logits[2] = 1.0
    sampled = sample(
        sampler_for([SamplingParams(temperature=0)] * 4, size, device), logits, [0, 1, 2, 3], [9] * 4, device
    )
    assert sampled.token_R.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert sampled.errors == {}
    assert sampled.logprobs == []


def test_top_k_of_one_is_greedy_even_when_tokens_tie(device: str) -> None:
    logits_V = torch.tensor([0.0, 5.0, 5.0, 1.0])
    assert set(tokens_at_many_positions(logits_V, SamplingParams(top_k=1), 20, device)) == {1}


# --- distribution -----------------------------------------------------------------------------------------------------

FILTERS = [
    {},
    {"temperature": 0.01},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 2},
    {"top_k": 50},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.5, "min_p": 0.02, "temperature": 0.8},
    {"top_p": 0.7, "min_p": 0.2},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_drawn_from_the_exact_distribution(size: int, fields: dict[str, float], device: str) -> None:
    logits_V, params = random_logits(1, size, seed=size)[0], SamplingParams(**fields)
    assert_drawn_from(tokens_at_many_positions(logits_V, params, 60, device), logits_V, params)


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_logits_that_tie(fields: dict[str, float], device: str) -> None:
    """Few values, as bfloat16 makes them; the tokens beside the last one kept that tie with it are kept as well."""
    logits_V, params = random_logits(1, 3000, seed=5)[0].mul(2).round() / 2, SamplingParams(**fields)
    assert_drawn_from(tokens_at_many_positions(logits_V, params, 60, device), logits_V, params)


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [0.01, 2.0])
def test_searching_few_blocks_changes_no_token(
    spread: float, fields: dict[str, float], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    logits_V, params = random_logits(1, 2000, spread)[0].bfloat16().float(), SamplingParams(**fields)
    expected = tokens_at_many_positions(logits_V, params, 40, device)
    for spare, blocks, at_once in [(1, 1, 5 * 2000), (10**6, 10**6, 1 << 24)]:
        monkeypatch.setattr(draw, "TOP_K_SPARE_BLOCKS", spare)
        monkeypatch.setattr(draw, "TOP_P_BLOCKS", blocks)
        monkeypatch.setattr(draw, "WEIGHTS_AT_ONCE", {device: at_once})
        assert tokens_at_many_positions(logits_V, params, 40, device) == expected


@pytest.mark.parametrize("fields", [{"top_k": 2}, {"top_k": 2, "top_p": 0.2}, {"top_p": 0.4}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("first", [0.0, 3.0])
def test_tokens_that_tie_are_kept_from_all_blocks(first: float, fields: dict[str, float], device: str) -> None:
    """One good token in every block, and more blocks than are searched first."""
    logits_V = torch.full((64 * 300,), -30.0)
    logits_V[13::64] = 0.0
    logits_V[13] = first
    params = SamplingParams(**fields)
    assert_drawn_from(tokens_at_many_positions(logits_V, params, 40, device), logits_V, params)


def test_a_token_of_no_probability_is_never_drawn(device: str) -> None:
    num_rows, size = 4, 200
    logits = torch.full((num_rows, size), -1e30, device=device)
    for row, allowed in enumerate([(0,), (199,), (63, 64), (0, 100, 199)]):
        logits[row, list(allowed)] = 1.0
    for uniform in (0.0, 2.0**-53, 0.5, 1 - 2.0**-53):
        for top_k, top_p, min_p in [(0, 1, 0), (2, 1, 0), (0, 0.9, 0), (0, 1, 0.5), (3, 0.99, 0.1)]:
            arrays = [np.full(num_rows, value) for value in (uniform, 1.0, min_p, top_p, top_k)]
            params = draw.DrawParams.of(*arrays, torch.device(device))
            rows, none = np.arange(num_rows), np.arange(0)
            by_k, by_p = (rows if top_k else none), (rows if top_p < 1 and not top_k else none)
            token_R = draw.draw(vocabulary.Vocabulary.of(logits), params, by_k, by_p)
            assert (logits.gather(1, token_R.unsqueeze(1)) == 1).all()


def test_the_ends_of_the_unit_interval_give_the_first_and_the_last_token(device: str) -> None:
    logits = torch.zeros(2, 100_000, device=device)
    ends = np.array([0.0, 1 - 2.0**-53])
    ones, zeros, none = np.ones(2), np.zeros(2), np.arange(0)
    params = draw.DrawParams.of(ends, ones, zeros, ones, zeros, torch.device(device))
    assert draw.draw(vocabulary.Vocabulary.of(logits), params, none, none).tolist() == [0, 99_999]


# --- seeds and batches ------------------------------------------------------------------------------------------------


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    seeds = np.array([0, 1, -1, 2**63 - 1, -(2**63), 42])
    for index in (0, 1, 100_000):
        drawn = draw.uniforms(seeds, np.full(len(seeds), index))
        assert drawn.tolist() == [slow_uniform(int(seed), index) for seed in seeds]


def test_tokens_depend_on_seed_and_output_position_only(device: str) -> None:
    params, size = SamplingParams(), 500
    logits_V = random_logits(1, size, 1.0)[0]
    expected = tokens_at_many_positions(logits_V, params, 30, device)
    assert len(set(expected)) > 15
    sampler = Sampler(7, size, eos_token_ids=[], device=device)
    sampler.add(5, params, 11, 100)
    sampler.add(2, params, 4, 101)
    again = [sample(sampler, logits_V[None], [5], [11 + i], device).token_R[0] for i in range(30)]
    other = [sample(sampler, logits_V[None], [2], [4 + i], device).token_R[0] for i in range(30)]
    assert again == expected
    assert other != expected


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


def observe_prompts(sampler: Sampler, count: int, length: int, size: int) -> None:
    slots, positions = np.repeat(np.arange(count), length), np.tile(np.arange(length), count)
    sampler.observe(slots.astype(np.int32), ((slots * 31 + positions * 7) % size).astype(np.int32), positions)


@pytest.mark.parametrize("size", [65, 3000])
def test_a_row_gets_the_same_token_alone_and_among_others(size: int, device: str) -> None:
    mixed = [params for params in MIXED if all(token < size for token in params.logit_bias)]
    rows, logits = list(range(len(mixed))), random_logits(len(mixed), size)
    sampler = sampler_for(mixed, size, device)
    observe_prompts(sampler, len(mixed), 6, size)
    together = sample(sampler, logits, rows, [6] * len(rows), device)
    backwards = sample(sampler, logits.flip(0), rows[::-1], [6] * len(rows), device)
    assert backwards.token_R[::-1].tolist() == together.token_R.tolist()
    assert backwards.logprobs[::-1] == together.logprobs
    torch.set_num_threads(2)
    for row in rows:
        alone = sample(sampler, logits[row : row + 1], [row], [6], device)
        assert alone.token_R[0] == together.token_R[row]
        assert (alone.logprobs or [None])[0] == together.logprobs[row]


def test_logits_are_not_changed(device: str) -> None:
    logits = random_logits(len(MIXED), 1000).to(device)
    before = logits.clone()
    sampler = sampler_for(MIXED, 1000, device)
    observe_prompts(sampler, len(MIXED), 6, 1000)
    sample(sampler, logits, list(range(len(MIXED))), [6] * len(MIXED), device)
    assert torch.equal(logits, before)


# --- penalties, biases, bans ------------------------------------------------------------------------------------------


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


def edited(sampler: Sampler, logits: Tensor, slots: list[int], positions: list[int]) -> Tensor:
    return sampler._edits.apply(logits, np.array(slots), np.array(positions)).cpu()


def test_penalties_equal_a_loop_over_all_tokens_as_sequences_come_grow_and_go(device: str) -> None:
    random, size, num_slots = np.random.default_rng(0), 40, 5
    sampler = Sampler(num_slots, size, eos_token_ids=[EOS], device=device)
    live: dict[int, tuple[SamplingParams, list[int], int]] = {}  # slot: params, tokens, prompt_len
    num_observed: dict[int, int] = {}
    for step in range(40):
        for slot in range(num_slots):
            if slot in live and random.random() < 0.1:
                sampler.remove(slot)
                del live[slot]
            if slot not in live and random.random() < 0.5:
                penalties = {
                    "repetition_penalty": float(random.choice([1.0, 1.5, 0.5])),
                    "frequency_penalty": float(random.choice([0.0, 0.7, -0.3])),
                    "presence_penalty": float(random.choice([0.0, 1.1])),
                }
                prompt_len = int(random.integers(1, 30))
                # a sequence that was preempted comes back with output tokens
                tokens = random.integers(0, size, prompt_len + int(random.integers(0, 5))).tolist()
                live[slot], num_observed[slot] = (SamplingParams(**penalties), tokens, prompt_len), 0
                sampler.add(slot, live[slot][0], prompt_len, 0)
        chunks = []  # prompts come in chunks, other tokens one by one
        for slot, (_, tokens, _) in live.items():
            start, stop = num_observed[slot], min(len(tokens), num_observed[slot] + int(random.integers(1, 12)))
            chunks += [(slot, tokens[position], position) for position in range(start, stop)]
            num_observed[slot] = stop
        if chunks:
            slot_T, token_T, position_T = np.array(chunks, dtype=np.int32).T
            sampler.observe(slot_T, token_T, position_T)
        ready = [slot for slot, (_, tokens, _) in live.items() if num_observed[slot] == len(tokens)]
        logits = random_logits(len(ready), size, seed=step)
        if ready:
            found = edited(sampler, logits.to(device), ready, [len(live[slot][1]) for slot in ready])
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


def test_the_end_is_banned_until_min_tokens(device: str) -> None:
    logits = torch.zeros(1, 10)
    logits[0, [EOS, 7, 5]] = torch.tensor([9.0, 8.0, 1.0])
    params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=[7], logit_bias={7: 50})
    sampler = sampler_for([params], 10, device, prompt_len=4)
    found = [int(sample(sampler, logits, [0], [4 + i], device).token_R[0]) for i in range(5)]
    assert found == [5, 5, 5, 7, 7]


def test_a_slot_keeps_nothing_of_the_sequence_before(device: str) -> None:
    logits = random_logits(1, 50).to(device)
    sampler = sampler_for([MIXED[6]], 50, device)
    observe_prompts(sampler, 1, 6, 50)
    sampler.remove(0)
    sampler.add(0, SamplingParams(presence_penalty=1.0), 6, 0)
    observe_prompts(sampler, 1, 6, 50)
    assert torch.equal(edited(sampler, logits, [0], [6]), logits.cpu())  # presence counts output only
    sampler.remove(0)
    sampler.add(0, SamplingParams(), 6, 0)
    assert edited(sampler, logits, [0], [6]).data_ptr() == logits.cpu().data_ptr() or device != "cpu"


# --- logits that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("params", MIXED, ids=range(len(MIXED)))
def test_rows_that_are_not_finite_are_reported_and_harm_no_other(
    bad: float, params: SamplingParams, device: str
) -> None:
    logits = random_logits(3, 1000)
    broken = logits.clone()
    broken[1, 640] = bad
    sampler = sampler_for([params] * 3, 1000, device)
    observe_prompts(sampler, 3, 6, 1000)
    good, found = (sample(sampler, x, [0, 1, 2], [6] * 3, device) for x in (logits, broken))
    assert good.errors == {}
    assert found.errors == {1: "the model produced logits that are not finite."}
    assert found.token_R[[0, 2]].tolist() == good.token_R[[0, 2]].tolist()
    assert 0 <= found.token_R[1] < 1000


def test_a_row_without_any_allowed_token_is_reported(device: str) -> None:
    params = SamplingParams(min_tokens=1, stop_token_ids=range(8))
    sampler = sampler_for([params], 8, device)
    assert "min_tokens" in sample(sampler, torch.zeros(1, 8), [0], [4], device).errors[0]
    assert sample(sampler, torch.zeros(1, 8), [0], [5], device).errors == {}


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_penalties_that_overflow_are_the_requests_fault(penalty: float, device: str) -> None:
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    sampler = sampler_for([params, SamplingParams(temperature=0)], 6, device)
    observe_prompts(sampler, 2, 4, 6)
    logits = torch.tensor([1.0, 2.0, 0.0, 3.0, -1.0, 0.0]).expand(2, -1)
    found = sample(sampler, logits, [0, 1], [4, 4], device)
    assert found.errors.keys() == {0}
    assert "penalties" in found.errors[0]
    assert found.token_R[1] == 3


def test_ends_beyond_the_vocabulary_ban_nothing(device: str) -> None:
    """A generation_config.json of another model: such an id is no token, and -1 is not the last one."""
    sampler = Sampler(1, 8, eos_token_ids=[EOS, 8, 128_009, -1], device=device)
    sampler.add(0, SamplingParams(temperature=0, min_tokens=2), 4, 0)
    logits = torch.arange(8.0).unsqueeze(0)
    assert sample(sampler, logits, [0], [4], device).token_R.tolist() == [7]
    logits[0, EOS] = 100
    assert sample(sampler, logits, [0], [4], device).token_R.tolist() == [7]


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_row_that_raises_costs_no_other_row_anything(
    logprobs: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [SamplingParams(temperature=temperature, logprobs=logprobs) for temperature in (0, 1, 1, 0.5)]
    sampler, logits = sampler_for(params, 50, device), random_logits(4, 50)
    expected = sample(sampler, logits, [0, 1, 2, 3], [6] * 4, device)
    apply = LogitEdits.apply

    def failing(edits: LogitEdits, logits_RV: Tensor, slot_R: np.ndarray, position_R: np.ndarray) -> Tensor:
        if 2 in slot_R:
            raise IndexError("planted")
        return apply(edits, logits_RV, slot_R, position_R)

    monkeypatch.setattr(LogitEdits, "apply", failing)
    found = sample(sampler, logits, [0, 1, 2, 3], [6] * 4, device)
    assert found.errors == {2: "sampling failed (IndexError: planted)."}
    assert found.token_R.tolist() == [*expected.token_R[:2], 0, expected.token_R[3]]
    others = [0, 1, 3]
    assert [found.logprobs[row] for row in others if logprobs] == [expected.logprobs[row] for row in others if logprobs]


# --- log-probabilities ------------------------------------------------------------------------------------------------


def assert_logprobs(found: TokenLogprobs, logits_V: Tensor, token: int, count: int, raw: bool = False) -> None:
    values = logits_V.float() if raw else logits_V.double().log_softmax(-1).float()
    order = sorted(range(len(values)), key=lambda i: (-float(logits_V[i]), i))
    entries = found.ranked()
    assert [i for i, _, _ in entries] == [token, *order[:count]]
    torch.testing.assert_close(
        torch.tensor([value for _, value, _ in entries]), values[[token, *order[:count]]], rtol=1e-6, atol=2e-6
    )
    assert [rank for _, _, rank in entries[1:]] == list(range(1, count + 1))
    assert found.sampled_rank == 1 + int((logits_V > logits_V[token]).sum())


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


def test_cumulated_logprob_of_greedy_tokens_is_that_of_a_softmax() -> None:
    logits = random_logits(8, 100)
    sampler = sampler_for([SamplingParams(temperature=0, logprobs=0)] * 8, 100)
    sampled = sample(sampler, logits, list(range(8)), [4] * 8)
    total = sum(one.ranked()[0][1] for one in sampled.logprobs if one is not None)
    assert total == pytest.approx(sum(log(row.softmax(-1).max()) for row in logits), abs=1e-4)


# --- vocabulary -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 64, 100, 640])
def test_best_tokens_equal_a_stable_sort(count: int, device: str) -> None:
    logits = random_logits(3, 640).mul(3).round().to(device)
    logits[0, ::7] = -0.0
    logits[2, 5:600] = -torch.inf
    found = vocabulary.Vocabulary.of(logits).best_tokens(count)
    assert torch.equal(found, logits.sort(dim=-1, descending=True, stable=True).indices[:, :count])


def test_best_blocks_hold_all_tokens_above_what_is_left(device: str) -> None:
    logits = random_logits(4, 1000).to(device)
    for num_blocks in (1, 3, 15, 16, 99):
        blocks = vocabulary.Vocabulary.of(logits).best_blocks(num_blocks)
        assert (blocks.first_RK.diff() > 0).all()
        for row in range(4):
            held = set(blocks.logits_RKB[row].flatten().tolist()) - {-torch.inf}
            rest = set(logits[row].tolist()) - held
            assert max(rest, default=-torch.inf) == blocks.left_R[row]
            assert len(held) + len(rest) == 1000
