"""A bad request is answered with its error, whatever a front end lets through, and the others are served."""

from pathlib import Path

import pytest

from hetis.core.sampling_params import SamplingParams
from tests.checkpoints import greedy_reference, load_reference, make_checkpoint
from tests.engine.local_fleet import LocalFleet

GOOD = [5, 6, 7]
GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama3")


def test_bad_requests_are_answered_one_by_one(directory: Path) -> None:
    bad = [
        ([5, 331], GREEDY, "token id 331: the vocabulary is 0 to 330"),
        ([-1], GREEDY, "token id -1"),
        ([], GREEDY, "the prompt is empty"),
        ([5] * 256, GREEDY, "256"),
        (GOOD, SamplingParams(stop_token_ids=[331]), "stop_token_ids is 331"),
        (GOOD, SamplingParams(logit_bias={400: 1.0}), "logit_bias is 400"),
        (GOOD, SamplingParams(min_tokens=1, stop_token_ids=range(331)), "min_tokens"),
    ]
    with LocalFleet(directory, "1+1") as fleet:
        prompts = [GOOD, *(prompt for prompt, _, _ in bad), GOOD]
        outputs = fleet.generate(prompts, [GREEDY, *(params for _, params, _ in bad), GREEDY], check=True)
    expected = greedy_reference(load_reference(directory), GOOD, 5)
    for good in (outputs[0], outputs[-1]):
        assert (good.token_ids, good.finish_reason, good.error) == (expected, "length", None)
    for output, (_, _, words) in zip(outputs[1:-1], bad, strict=True):
        assert (output.token_ids, output.finish_reason) == ([], "error")
        assert output.error is not None
        assert words in output.error
