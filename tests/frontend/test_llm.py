"""`LLM` on the packaged model: prompts, failing requests, streams and counters, compared with transformers."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from hetis import LLM, SamplingParams
from hetis.frontend.requests import Piece
from hetis.frontend.tokenizer import load_tokenizer
from tests.frontend.reference import GREEDY, PROMPTS, greedy, one, tokenizer

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
def test_wrong_requests_are_refused_before_any_runs(tiny: LLM, prompt: Any, params: Any, word: str) -> None:
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


def test_chat_renders_the_template(tiny: LLM) -> None:
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


def test_a_request_that_cannot_be_sampled_does_not_affect_others(tiny: LLM, caplog: pytest.LogCaptureFixture) -> None:
    no_token_left = SamplingParams(max_tokens=8, min_tokens=2, stop_token_ids=range(tiny.vocab_size), logprobs=1)
    outputs = tiny.generate(PROMPTS, [GREEDY, no_token_left, GREEDY])
    good, failed = [outputs[0].outputs[0], outputs[2].outputs[0]], outputs[1].outputs[0]
    assert [completion.token_ids for completion in good] == [greedy(PROMPTS[0], 12), greedy(PROMPTS[2], 12)]
    assert [completion.error for completion in good] == [None, None]
    assert (failed.finish_reason, failed.stop_reason, failed.token_ids, failed.text) == ("error", None, [], "")
    assert failed.error is not None
    assert "min_tokens" in failed.error
    assert outputs[1].finished
    assert f"1 of 3 prompts failed; prompt 1: {failed.error}" in caplog.text
    pieces = [piece for piece in tiny.stream(PROMPTS, [GREEDY, no_token_left, GREEDY]) if piece.finished]
    reasons = {piece.prompt_index: (piece.finish_reason, piece.error) for piece in pieces}
    assert reasons == {0: ("length", None), 1: ("error", failed.error), 2: ("length", None)}


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


def test_leaving_a_stream_early_frees_the_pages(tiny: LLM) -> None:
    endless = SamplingParams(max_tokens=900, ignore_eos=True)
    before = tiny.fleet_stats().num_steps
    stream = tiny.stream(PROMPTS, endless)
    for _ in range(5):
        next(stream)
    assert pages_used(tiny) > 0
    stream.close()  # type: ignore[attr-defined]
    while pages_used(tiny):  # steps in flight
        pass
    assert tiny.fleet_stats().num_steps - before < endless.max_tokens, "the requests were not computed to their end"
    assert one(tiny.generate(PROMPTS[1], GREEDY)).token_ids == greedy(PROMPTS[1], 12)


def test_streams_get_only_their_own_pieces(tiny: LLM) -> None:
    """A call within the loop of another one, and requests for the counters in between."""
    outer: list[int] = []
    for piece in tiny.stream(PROMPTS[0], GREEDY):
        outer += piece.token_ids
        assert one(tiny.generate(PROMPTS[1], SamplingParams(max_tokens=2, temperature=0))).token_ids
        tiny.fleet_stats()
    assert outer == greedy(PROMPTS[0], 12)


def test_fleet_stats_count_the_work_of_every_device(tiny: LLM) -> None:
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


def test_the_ledger_is_available(tiny: LLM) -> None:
    assert "rank" in tiny.ledger


# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "Hello  world\n", "naïve 日本語 🎉", "<|endoftext|>x"])
def test_load_tokenizer_encodes_as_transformers_does(text: str) -> None:
    ours = load_tokenizer(None, None)
    assert ours.encode(text) == tokenizer().encode(text)
