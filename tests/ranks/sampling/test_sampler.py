"""The sampler against a slow one that takes one row at a time, sorts and adds in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hetis.core.sampling_params import SamplingParams
from hetis.ranks.sampling import draw, vocabulary
from hetis.ranks.sampling.logit_edits import LogitEdits
from hetis.ranks.sampling.sampler import Sampler
from tests.ranks.sampling.slow_sampler import (
    MIXED,
    assert_drawn_from,
    observe_prompts,
    random_logits,
    sample,
    sampler_for,
    slow_uniform,
    tokens_at_many_positions,
)

SIZES = [1, 5, 64, 65, 1000, 3001]
pytestmark = pytest.mark.usefixtures("one_thread")


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
def test_tied_logits_are_drawn_from_the_exact_distribution(fields: dict[str, float], device: str) -> None:
    """Logits have few values, as in bfloat16; tokens that tie with the last one kept are kept too."""
    logits_V, params = random_logits(1, 3000, seed=5)[0].mul(2).round() / 2, SamplingParams(**fields)
    assert_drawn_from(tokens_at_many_positions(logits_V, params, 60, device), logits_V, params)


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [0.01, 2.0])
def test_the_number_of_searched_blocks_changes_no_token(
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
def test_tied_tokens_are_kept_from_all_blocks(first: float, fields: dict[str, float], device: str) -> None:
    """One likely token in every block, and more blocks than are searched first."""
    logits_V = torch.full((64 * 300,), -30.0)
    logits_V[13::64] = 0.0
    logits_V[13] = first
    params = SamplingParams(**fields)
    assert_drawn_from(tokens_at_many_positions(logits_V, params, 40, device), logits_V, params)


def test_a_token_of_probability_zero_is_never_drawn(device: str) -> None:
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


@pytest.mark.parametrize("size", [65, 3000])
def test_a_row_gets_the_same_token_alone_and_in_a_batch(size: int, device: str) -> None:
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


# --- rows without a token ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("params", MIXED, ids=range(len(MIXED)))
def test_rows_that_are_not_finite_are_reported_and_affect_no_other(
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


def test_a_row_without_an_allowed_token_is_reported(device: str) -> None:
    params = SamplingParams(min_tokens=1, stop_token_ids=range(8))
    sampler = sampler_for([params], 8, device)
    assert "min_tokens" in sample(sampler, torch.zeros(1, 8), [0], [4], device).errors[0]
    assert sample(sampler, torch.zeros(1, 8), [0], [5], device).errors == {}


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_penalties_that_overflow_are_an_error_of_their_row(penalty: float, device: str) -> None:
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    sampler = sampler_for([params, SamplingParams(temperature=0)], 6, device)
    observe_prompts(sampler, 2, 4, 6)
    logits = torch.tensor([1.0, 2.0, 0.0, 3.0, -1.0, 0.0]).expand(2, -1)
    found = sample(sampler, logits, [0, 1], [4, 4], device)
    assert found.errors.keys() == {0}
    assert "penalties" in found.errors[0]
    assert found.token_R[1] == 3


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_row_that_raises_affects_no_other_row(
    logprobs: int | None, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    (record,) = caplog.records
    assert record.getMessage().startswith("4 rows")
    assert record.exc_info is not None, "the log has the traceback, even if no row raises alone"
    assert found.token_R.tolist() == [*expected.token_R[:2], 0, expected.token_R[3]]
    others = [0, 1, 3]
    assert [found.logprobs[row] for row in others if logprobs] == [expected.logprobs[row] for row in others if logprobs]
