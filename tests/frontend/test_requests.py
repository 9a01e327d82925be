"""The front end's record of a request: what is sent again is all that has been generated, with the same seed."""

from itertools import count
from typing import Any

from hetis.core.messages import TokenOutput
from hetis.core.sampling_params import SamplingParams
from hetis.frontend.requests import Request, resolve_seeds


def make_request(params: SamplingParams, seeds: list[int]) -> Request:
    return Request("mine", "mine#4", 0, "text", [5, 6, 7], params, seeds, None)


def tokens(key: str, *token_ids: int, **fields: Any) -> TokenOutput:
    return TokenOutput(id=key, token_ids=list(token_ids), **fields)


def test_what_is_sent_again_has_the_output_so_far_and_the_same_seed() -> None:
    params = SamplingParams(n=3, max_tokens=9, prompt_logprobs=1)
    request = make_request(params, [11, 12, 13])
    first = list(request.messages())
    assert [(each.id, each.token_ids, each.prompt_len, each.seed) for each in first] == [
        ("mine#4/0", [5, 6, 7], 3, 11),
        ("mine#4/1", [5, 6, 7], 3, 12),
        ("mine#4/2", [5, 6, 7], 3, 13),
    ]
    assert [each.params.prompt_logprobs for each in first] == [1, None, None]
    for new in (tokens("mine#4/0", 1, 2), tokens("mine#4/2", 3), tokens("mine#4/1", 4, finish_reason="length")):
        request.add(new)
    again = list(request.messages())
    assert [(each.id, each.token_ids, each.prompt_len, each.seed) for each in again] == [
        ("mine#4/0", [5, 6, 7, 1, 2], 3, 11),
        ("mine#4/2", [5, 6, 7, 3], 3, 13),
    ]
    assert first[0].token_ids == [5, 6, 7], "a message is not changed by what comes later"
    assert [each.id for each in request.aborts()] == ["mine#4/0", "mine#4/2"]
    assert [piece.index for piece in request.abort()] == [0, 2]
    assert request.finished
    assert list(request.messages()) == request.aborts() == request.abort() == []
    assert [each.finish_reason for each in request.output().outputs] == ["abort", "length", "abort"]


def test_seeds_are_the_requests_own_or_of_the_numbers_of_its_sequences() -> None:
    """So the same requests in the same order draw the same tokens, whatever else the driver serves."""
    numbers = count(0)
    first = resolve_seeds(SamplingParams(), 5, numbers)
    second = resolve_seeds(SamplingParams(n=3), 5, numbers)
    assert len({*first, *second}) == 4
    assert all(0 <= seed < 1 << 63 for seed in [*first, *second])
    assert first[0] == 5
    again = count(0)
    assert [resolve_seeds(SamplingParams(), 5, again), resolve_seeds(SamplingParams(n=3), 5, again)] == [first, second]
    assert resolve_seeds(SamplingParams(), 6, count(0)) != first
    assert resolve_seeds(SamplingParams(n=2, seed=-9), 5, numbers) == [-9, -10]
    assert next(numbers) == 4, "seeds of its own take no numbers"
