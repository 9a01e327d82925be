"""Completions of `LLM` on the packaged model: sampling, log-probabilities and ends, compared with transformers."""

import pytest

from hetis import LLM, SamplingParams
from tests.frontend.reference import GREEDY, PROMPTS, greedy, logprobs_of, one, tokenizer

# --- sampling ---------------------------------------------------------------------------------------------------------


def test_several_completions_of_a_prompt_differ_and_repeat_with_the_seed(tiny: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=12, seed=7)
    first, again = (tiny.generate(PROMPTS[1], params)[0].outputs for _ in range(2))
    assert [completion.index for completion in first] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in first}) == 3
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    other = tiny.generate(PROMPTS[1], SamplingParams(n=3, max_tokens=12, seed=8))[0].outputs
    assert [c.token_ids for c in other] != [c.token_ids for c in first]


def test_a_seed_gives_the_same_tokens_beside_other_requests(tiny: LLM) -> None:
    params = SamplingParams(max_tokens=12, seed=3)
    alone = one(tiny.generate(PROMPTS[0], params)).token_ids
    crowd = tiny.generate([PROMPTS[1], PROMPTS[0], PROMPTS[2]], params)
    assert crowd[1].outputs[0].token_ids == alone


def test_logprobs_are_those_of_transformers(tiny: LLM) -> None:
    completion = one(tiny.generate(PROMPTS[0], SamplingParams(max_tokens=6, temperature=0, logprobs=4)))
    ids = tokenizer().encode(PROMPTS[0])
    rows = logprobs_of([*ids, *completion.token_ids])[len(ids) - 1 : -1]
    assert len(completion.logprobs) == len(completion.token_ids) == 6
    for row, token, found in zip(rows, completion.token_ids, completion.logprobs, strict=True):
        best = row.topk(4)
        assert list(found) == best.indices.tolist()  # greedy: the token itself is the best
        assert next(iter(found)) == token
        assert [entry.rank for entry in found.values()] == [1, 2, 3, 4]
        assert [entry.logprob for entry in found.values()] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [entry.decoded_token for entry in found.values()] == [tokenizer().decode([t]) for t in found]
    total = sum(found[token].logprob for found, token in zip(completion.logprobs, completion.token_ids, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


def test_an_unlikely_token_is_listed_besides_the_best(tiny: LLM) -> None:
    params = SamplingParams(max_tokens=30, temperature=0.9, seed=1, logprobs=1)
    completion = one(tiny.generate(PROMPTS[0], params))
    sizes = {len(found) for found in completion.logprobs}
    assert sizes == {1, 2}, "at this temperature some tokens are the best and some are not"
    assert all(next(iter(f)) == t for f, t in zip(completion.logprobs, completion.token_ids, strict=True))


def test_without_logprobs_there_are_none(tiny: LLM) -> None:
    output = tiny.generate(PROMPTS[0], GREEDY)[0]
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None
    assert output.prompt_logprobs is None


def test_prompt_logprobs_are_those_of_transformers(tiny: LLM) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 4
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=2)
    output = tiny.generate(prompt, params)[0]
    ids = tokenizer().encode(prompt)
    found = output.prompt_logprobs
    assert found is not None
    assert len(found) == len(ids)
    assert found[0] is None
    for row, token, entry in zip(logprobs_of(ids)[:-1], ids[1:], found[1:], strict=True):
        assert entry is not None
        assert next(iter(entry)) == token
        assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry[token].rank == 1 + int((row > row[token]).sum())
        assert set(entry) == {token, *row.topk(2).indices.tolist()}


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_stop_string_across_tokens_ends_the_text(tiny: LLM) -> None:
    full = one(tiny.generate(PROMPTS[0], SamplingParams(max_tokens=30, temperature=0)))
    pieces = [tokenizer().decode([token]) for token in full.token_ids]
    border = len("".join(pieces[:10]))
    stop = full.text[border - 3 : border + 3]
    assert not any(stop in piece for piece in pieces)
    params = SamplingParams(max_tokens=30, temperature=0, stop=[stop, "never there"])
    completion = one(tiny.generate(PROMPTS[0], params))
    assert completion.text == full.text[: full.text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert len(completion.token_ids) < 30
    shown = SamplingParams(max_tokens=30, temperature=0, stop=stop, include_stop_str_in_output=True)
    assert one(tiny.generate(PROMPTS[0], shown)).text == full.text[: full.text.index(stop) + len(stop)]


def test_any_number_of_stop_strings(tiny: LLM) -> None:
    full = one(tiny.generate(PROMPTS[0], SamplingParams(max_tokens=30, temperature=0))).text
    stops = [*(f"never {n}" for n in range(50)), full[20:27]]
    completion = one(tiny.generate(PROMPTS[0], SamplingParams(max_tokens=30, temperature=0, stop=stops)))
    assert (completion.text, completion.stop_reason) == (full[: full.index(full[20:27])], full[20:27])


def test_streamed_text_never_has_part_of_a_stop_string(tiny: LLM) -> None:
    full = one(tiny.generate(PROMPTS[0], SamplingParams(max_tokens=30, temperature=0))).text
    stop = full[20:27]
    pieces = list(tiny.stream(PROMPTS[0], SamplingParams(max_tokens=30, temperature=0, stop=stop)))
    assert "".join(piece.text for piece in pieces) == full[: full.index(stop)]
    assert pieces[-1].finished


def test_a_stop_token_ends_the_output_and_is_not_in_the_text(tiny: LLM) -> None:
    full = one(tiny.generate(PROMPTS[0], GREEDY))
    token = full.token_ids[5]
    first = full.token_ids.index(token)
    completion = one(tiny.generate(PROMPTS[0], SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[token])))
    assert completion.token_ids == full.token_ids[: first + 1]
    assert completion.text == tokenizer().decode(full.token_ids[:first])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", token)


def test_min_tokens_bans_the_stop_token_before(tiny: LLM) -> None:
    token = greedy(PROMPTS[0], 1)[0]
    stopping = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[token])
    assert one(tiny.generate(PROMPTS[0], stopping)).token_ids == [token]
    later = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[token], min_tokens=4)
    completion = one(tiny.generate(PROMPTS[0], later))
    assert len(completion.token_ids) >= 4
    assert token not in completion.token_ids[:4]


def test_end_of_sequence_ends_the_output_unless_ignored(tiny: LLM) -> None:
    end = tokenizer().eos_token_id
    wanted = SamplingParams(max_tokens=5, temperature=0, logit_bias={end: 100.0})
    completion = one(tiny.generate(PROMPTS[0], wanted))
    assert completion.token_ids == [end]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("", "stop", None)
    on = SamplingParams(max_tokens=5, temperature=0, logit_bias={end: 100.0}, ignore_eos=True)
    completion = one(tiny.generate(PROMPTS[0], on))
    assert completion.token_ids == [end] * 5
    assert completion.finish_reason == "length"


def test_without_max_tokens_the_output_fills_the_context(tiny: LLM) -> None:
    prompt = [5] * (tiny.max_model_len - 20)
    completion = one(tiny.generate(prompt, SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)))
    assert len(completion.token_ids) == 20
    assert completion.finish_reason == "length"
