"""`LLM`: what goes in and what comes out, on the packaged model, against transformers where it can say."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from hetis import LLM, RequestOutput, SamplingParams
from hetis.frontend.requests import Piece
from hetis.frontend.tokenizer import load_tokenizer
from hetis.models.hub import PACKAGED

GREEDY = SamplingParams(max_tokens=12, temperature=0)
PROMPTS = ["The function returns", "It was", "In the beginning of the"]


@cache
def reference() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(PACKAGED, dtype=torch.float32).eval()


@cache
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(PACKAGED)


@torch.inference_mode()
def logprobs_of(ids: list[int]) -> torch.Tensor:
    """[T, V]: of the token that follows each token."""
    logits: torch.Tensor = reference()(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


@torch.inference_mode()
def greedy(prompt: str, count: int) -> list[int]:
    ids = tokenizer().encode(prompt)
    out = reference().generate(
        torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in out[0, len(ids) :]]


def one(outputs: list[RequestOutput]) -> Any:
    assert len(outputs) == 1
    assert len(outputs[0].outputs) == 1
    return outputs[0].outputs[0]


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_text_and_token_prompts_give_what_transformers_gives(tiny: LLM) -> None:
    ids = tokenizer().encode(PROMPTS[1])
    outputs = tiny.generate([PROMPTS[0], ids, PROMPTS[2]], GREEDY)
    assert [output.prompt for output in outputs] == [PROMPTS[0], None, PROMPTS[2]]
    assert [output.prompt_token_ids for output in outputs] == [tokenizer().encode(prompt) for prompt in PROMPTS]
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == greedy(prompt, 12)
        assert prompt + completion.text == tokenizer().decode([*output.prompt_token_ids, *completion.token_ids])
        assert (completion.finish_reason, completion.stop_reason) == ("length", None)
        assert output.finished


def test_one_prompt_needs_no_list(tiny: LLM) -> None:
    assert len(tiny.generate("It was", GREEDY)) == 1
    assert len(tiny.generate([5, 6, 7], GREEDY)) == 1
    assert tiny.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_parameters(tiny: LLM) -> None:
    several = [SamplingParams(max_tokens=count, temperature=0) for count in (1, 5, 3)]
    outputs = tiny.generate(PROMPTS, several)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]
    alone = [tiny.generate(prompt, params) for prompt, params in zip(PROMPTS, several, strict=True)]
    assert [one(output).token_ids for output in alone] == [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("prompt", "params", "word"),
    [
        ("", SamplingParams(), "prompt 0 is empty"),
        ([1, 10**6], SamplingParams(), "1000000"),
        ([-1], SamplingParams(), "-1"),
        ([1] * 1024, SamplingParams(), "max_model_len is 1024"),
        ("It", SamplingParams(logprobs=51), "logprobs"),
        (["a", "b"], [SamplingParams()], "2 prompts but 1"),
        ("It", SamplingParams(stop_token_ids=[10**6]), "stop_token_ids"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(tiny: LLM, prompt: Any, params: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        tiny.generate(prompt, params)


def test_prompts_in_vllms_forms_and_as_arrays(tiny: LLM) -> None:
    ids = tokenizer().encode(PROMPTS[0])
    forms = [{"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}, torch.tensor(ids), np.array(ids), PROMPTS[0]]
    outputs = tiny.generate(forms, GREEDY)
    assert [output.prompt for output in outputs] == [PROMPTS[0], None, None, None, PROMPTS[0]]
    assert {tuple(output.prompt_token_ids) for output in outputs} == {tuple(ids)}
    assert {output.outputs[0].text for output in outputs} == {outputs[0].outputs[0].text}
    assert one(tiny.generate({"prompt": PROMPTS[0]}, GREEDY)).text == outputs[0].outputs[0].text


def test_a_chat_is_its_template_filled_in(tiny: LLM) -> None:
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}bot:"
    conversations = [[{"role": "user", "content": text}] for text in PROMPTS]
    outputs = tiny.chat(conversations, GREEDY, chat_template=template)
    assert [output.prompt for output in outputs] == [f"user: {text}\nbot:" for text in PROMPTS]
    assert outputs[1].outputs[0].text == one(tiny.generate(f"user: {PROMPTS[1]}\nbot:", GREEDY)).text
    assert one(tiny.chat(conversations[1], GREEDY, chat_template=template)).text == outputs[1].outputs[0].text
    with pytest.raises(ValueError, match="no chat template"):
        tiny.chat(conversations, GREEDY)


def test_the_tokenizer_is_that_of_transformers(tiny: LLM) -> None:
    assert tiny.get_tokenizer().encode(PROMPTS[0]) == tokenizer().encode(PROMPTS[0])


# --- requests that fail -----------------------------------------------------------------------------------------------


def test_a_request_that_cannot_be_sampled_fails_alone(tiny: LLM, caplog: pytest.LogCaptureFixture) -> None:
    nothing_left = SamplingParams(max_tokens=8, min_tokens=2, stop_token_ids=range(tiny.vocab_size), logprobs=1)
    outputs = tiny.generate(PROMPTS, [GREEDY, nothing_left, GREEDY])
    good, failed = [outputs[0].outputs[0], outputs[2].outputs[0]], outputs[1].outputs[0]
    assert [completion.token_ids for completion in good] == [greedy(PROMPTS[0], 12), greedy(PROMPTS[2], 12)]
    assert [completion.error for completion in good] == [None, None]
    assert (failed.finish_reason, failed.stop_reason, failed.token_ids, failed.text) == ("error", None, [], "")
    assert failed.error is not None
    assert "min_tokens" in failed.error
    assert outputs[1].finished
    assert f"1 of 3 prompts failed; prompt 1: {failed.error}" in caplog.text
    pieces = [piece for piece in tiny.stream(PROMPTS, [GREEDY, nothing_left, GREEDY]) if piece.finished]
    reasons = {piece.prompt_index: (piece.finish_reason, piece.error) for piece in pieces}
    assert reasons == {0: ("length", None), 1: ("error", failed.error), 2: ("length", None)}


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_several_answers_to_one_prompt_differ_and_come_back_with_the_seed(tiny: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=12, seed=7)
    first, again = (tiny.generate(PROMPTS[1], params)[0].outputs for _ in range(2))
    assert [completion.index for completion in first] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in first}) == 3
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    other = tiny.generate(PROMPTS[1], SamplingParams(n=3, max_tokens=12, seed=8))[0].outputs
    assert [c.token_ids for c in other] != [c.token_ids for c in first]


def test_a_seed_gives_the_same_in_company(tiny: LLM) -> None:
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


def test_a_stop_string_across_token_borders_ends_the_text(tiny: LLM) -> None:
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


def test_streamed_text_never_shows_part_of_a_stop_string(tiny: LLM) -> None:
    full = one(tiny.generate(PROMPTS[0], SamplingParams(max_tokens=30, temperature=0))).text
    stop = full[20:27]
    pieces = list(tiny.stream(PROMPTS[0], SamplingParams(max_tokens=30, temperature=0, stop=stop)))
    assert "".join(piece.text for piece in pieces) == full[: full.index(stop)]
    assert pieces[-1].finished


def test_a_stop_token_ends_it_and_is_kept_as_a_token_only(tiny: LLM) -> None:
    full = one(tiny.generate(PROMPTS[0], GREEDY))
    token = full.token_ids[5]
    first = full.token_ids.index(token)
    completion = one(tiny.generate(PROMPTS[0], SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[token])))
    assert completion.token_ids == full.token_ids[: first + 1]
    assert completion.text == tokenizer().decode(full.token_ids[:first])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", token)


def test_min_tokens_keeps_the_stop_token_away(tiny: LLM) -> None:
    token = greedy(PROMPTS[0], 1)[0]
    stopping = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[token])
    assert one(tiny.generate(PROMPTS[0], stopping)).token_ids == [token]
    later = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[token], min_tokens=4)
    completion = one(tiny.generate(PROMPTS[0], later))
    assert len(completion.token_ids) >= 4
    assert token not in completion.token_ids[:4]


def test_the_models_own_end_stops_unless_ignored(tiny: LLM) -> None:
    end = tokenizer().eos_token_id
    wanted = SamplingParams(max_tokens=5, temperature=0, logit_bias={end: 100.0})
    completion = one(tiny.generate(PROMPTS[0], wanted))
    assert completion.token_ids == [end]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("", "stop", None)
    on = SamplingParams(max_tokens=5, temperature=0, logit_bias={end: 100.0}, ignore_eos=True)
    completion = one(tiny.generate(PROMPTS[0], on))
    assert completion.token_ids == [end] * 5
    assert completion.finish_reason == "length"


def test_without_max_tokens_it_goes_on_to_the_longest_sequence(tiny: LLM) -> None:
    prompt = [5] * (tiny.max_model_len - 20)
    completion = one(tiny.generate(prompt, SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)))
    assert len(completion.token_ids) == 20
    assert completion.finish_reason == "length"


# --- streams and fleet ------------------------------------------------------------------------------------------------


def test_a_stream_is_the_text_in_pieces(tiny: LLM) -> None:
    params = SamplingParams(n=2, max_tokens=12, seed=5)
    texts: dict[tuple[int, int], str] = {}
    tokens: dict[tuple[int, int], list[int]] = {}
    finished: list[Piece] = []
    for piece in tiny.stream(PROMPTS, params):
        key = piece.prompt_index, piece.index
        texts[key] = texts.get(key, "") + piece.text
        tokens.setdefault(key, []).extend(piece.token_ids)
        finished += [piece] if piece.finished else []
    whole = tiny.generate(PROMPTS, params)
    for i, output in enumerate(whole):
        for completion in output.outputs:
            assert texts[i, completion.index] == completion.text
            assert tokens[i, completion.index] == completion.token_ids
    assert len(finished) == 6


def pages_used(llm: LLM) -> int:
    return sum(member.pages_used for member in llm.fleet_stats().members)


def test_leaving_a_stream_early_gives_the_pages_back(tiny: LLM) -> None:
    endless = SamplingParams(max_tokens=900, ignore_eos=True)
    before = tiny.fleet_stats().num_steps
    stream = tiny.stream(PROMPTS, endless)
    for _ in range(5):
        next(stream)
    assert pages_used(tiny) > 0
    stream.close()  # type: ignore[attr-defined]
    while pages_used(tiny):  # steps that were under way
        pass
    assert tiny.fleet_stats().num_steps - before < endless.max_tokens, "nothing was computed to its end"
    assert one(tiny.generate(PROMPTS[1], GREEDY)).token_ids == greedy(PROMPTS[1], 12)


def test_streams_do_not_take_each_others_pieces(tiny: LLM) -> None:
    """One call inside the loop of another, and questions for the counters in between."""
    outer: list[int] = []
    for piece in tiny.stream(PROMPTS[0], GREEDY):
        outer += piece.token_ids
        assert one(tiny.generate(PROMPTS[1], SamplingParams(max_tokens=2, temperature=0))).token_ids
        tiny.fleet_stats()
    assert outer == greedy(PROMPTS[0], 12)


def test_fleet_stats_count_what_every_device_did(tiny: LLM) -> None:
    tiny.generate(PROMPTS, GREEDY)
    stats = tiny.fleet_stats()
    assert [member.rank for member in stats.members] == [0, 1, 2]
    assert [member.role for member in stats.members] == ["primary", "attention worker", "attention worker"]
    assert all(member.device == "cpu" for member in stats.members)
    assert math.isclose(sum(member.attention_share for member in stats.members), 1.0)
    assert all(0 < member.pages_peak <= member.pages_total for member in stats.members)
    assert all(member.heads_peak > 0 and member.heads == 0 and member.pages_used == 0 for member in stats.members)
    sent, received = stats.members[0].bytes_sent, stats.members[0].bytes_received
    assert sent.keys() == {"0->1", "0->2"}
    assert all(count > 0 for count in [*sent.values(), *received.values()])
    for worker in stats.members[1:]:
        assert worker.bytes_received[f"0->{worker.rank}"] == sent[f"0->{worker.rank}"]
    assert stats.num_steps > 0


def test_the_ledger_is_shown(tiny: LLM) -> None:
    assert "rank" in tiny.ledger


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "Hello  world\n", "naïve 日本語 🎉", "<|endoftext|>x"])
def test_our_short_cut_is_the_same_tokenizer(text: str) -> None:
    ours = load_tokenizer(None, None)
    assert ours.encode(text) == tokenizer().encode(text)
