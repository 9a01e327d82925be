"""Continuation law: a sequence that is sent again with its output so far goes on as if it had never been cut.

So the front end's record of a request is all that a driver needs, and a driver may be started again.
"""

from random import Random
from typing import Any

import pytest

from hetis.core.messages import AddRequest
from hetis.core.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.local_fleet import Generated, LocalFleet, RandomDispatcher
from tests.engine.test_parity import prompts
from tests.scheduler.toy_engine import ToyEngine, alone, make_plan, make_sequence

SAMPLED = {"temperature": 0.9, "seed": 11, "logprobs": 3}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "logprobs": 3},
    "sampled": SAMPLED,
    "restricted": SAMPLED | {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "logit_bias": {7: 2.0}},
    "penalties": SAMPLED | {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "banned": SAMPLED | {"min_tokens": 9, "stop_token_ids": range(0, 331, 3)},
    "stopped": SAMPLED | {"stop_token_ids": range(0, 331, 9)},
    "scored": SAMPLED | {"prompt_logprobs": 2},
}


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_toy_sequences_go_on(seed: int, depth: int) -> None:
    """Beside new ones, and with so few pages that some are preempted."""
    random = Random(seed)
    num_pages = dict.fromkeys(range(4), 40)
    engine = ToyEngine(make_plan([[2, 1]], 2), num_pages, random=random, moves_per_step=0.1, depth=depth)
    sequences, expected = [], []
    for arrival in range(24):
        sequence = make_sequence(arrival, random.randrange(1, 12), random.randrange(1, 14), frozenset({13}))
        whole = alone(sequence, engine.max_model_len or 0)
        sequence.token_ids = whole[: random.randrange(sequence.prompt_len, len(whole))]
        sequences.append(sequence)
        expected.append(whole)
    engine.serve(sequences)
    assert [sequence.token_ids for sequence in sequences] == expected


@pytest.fixture(scope="module", params=[False, True], ids=["depth 0", "depth 1"])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "five_groups")
    with LocalFleet(
        directory, "1+2", dispatcher=RandomDispatcher(5), block_size=4, max_num_batched_tokens=64, max_num_seqs=8,
        async_scheduling=request.param,
    ) as fleet:  # fmt: skip
        yield fleet


@pytest.mark.parametrize("name", PARAMS)
def test_a_cut_sequence_gives_exactly_the_rest(fleet: LocalFleet, name: str) -> None:
    params = SamplingParams(**({"max_tokens": 16, "ignore_eos": True} | PARAMS[name]))
    some = prompts()[:4]
    whole = fleet.generate(some, params, check=True)
    for cut in (lambda count: 1, lambda count: count // 2, lambda count: count - 1):
        counts = [cut(len(one.token_ids)) for one in whole]
        outputs = [one.token_ids[:count] for one, count in zip(whole, counts, strict=True)]
        rest = fleet.generate(some, params, outputs=outputs, check=True)
        for found, one, count in zip(rest, whole, counts, strict=True):
            assert_is_rest(found, one, count)


def assert_is_rest(found: Generated, whole: Generated, count: int) -> None:
    assert found.token_ids == whole.token_ids[count:]
    assert found.rows == whole.rows[count:], "log-probabilities have the same bits"
    assert found.finish_reason == whole.finish_reason
    assert found.prompt_rows == ([] if count else whole.prompt_rows), "the prompt was scored with the first token"


def test_records_that_no_sequence_can_have_are_refused(fleet: LocalFleet) -> None:
    params, limit = SamplingParams(max_tokens=4), fleet.setup.max_model_len
    cases = [
        (AddRequest(id="a", token_ids=[1, 2], prompt_len=0, seed=0, params=params), "prompt_len is 0"),
        (AddRequest(id="a", token_ids=[1, 2], prompt_len=3, seed=0, params=params), "prompt_len is 3"),
        (AddRequest(id="a", token_ids=[1, 2], prompt_len=-1, seed=0, params=params), "prompt_len is -1"),
        (AddRequest(id="a", token_ids=[1, 2], prompt_len=2, seed=1 << 63, params=params), "64-bit"),
        (AddRequest(id="a", token_ids=[1, 2], prompt_len=2, seed=-(1 << 63) - 1, params=params), "64-bit"),
        (AddRequest(id="a", token_ids=[1, 331], prompt_len=1, seed=0, params=params), "token id 331"),
        (AddRequest(id="a", token_ids=[1] * 5, prompt_len=1, seed=0, params=params), "complete"),
        (AddRequest(id="a", token_ids=[1] * limit, prompt_len=1, seed=0, params=SamplingParams(max_tokens=None)), ""),
    ]
    for request, words in cases:
        fleet.engine.add(request, 0.0)
        [output] = fleet.engine.take_outputs()
        assert output.finish_reason == "error"
        assert output.error is not None
        assert words in output.error
