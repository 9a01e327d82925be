"""The server on a real fleet: answers are those of `LLM.generate`, token for token, and clients leave nothing behind.

The two fleets have different plans, on which no token may depend.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from itertools import combinations
from typing import Any, NamedTuple, TypeVar

import msgspec
import pytest
from fastapi import FastAPI

from hetis import LLM, AsyncLLM, SamplingParams
from hetis.core.messages import EngineStatus, StatusQuery
from hetis.server.app import build_app
from hetis.server.options import ServerOptions
from tests.server.stand_in import TEMPLATE, events, http_client
from tests.server.test_failures import Connection, until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS = ["The module defines", "Return a new", "Grüße, ❤"]
CONVERSATION = [{"role": "user", "content": "What is a file?"}]
T = TypeVar("T")


class Served(NamedTuple):
    runner: asyncio.Runner
    llm: AsyncLLM
    app: FastAPI

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        async def ask() -> Any:
            async with http_client(self.app) as client:
                return await client.post(path, json=body)

        response = self.run(ask())
        assert response.status_code == 200, response.text
        return events(response.text) if body.get("stream") else response.json()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with asyncio.Runner() as runner:
        llm = AsyncLLM(plan="1+0", device="cpu", dtype="float32", kv_cache_memory="64MiB")
        try:
            runner.run(llm.wait_until_ready())
            yield Served(runner, llm, build_app(llm, ServerOptions(chat_template=TEMPLATE)))
        finally:
            llm.close()


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 12},
    {"temperature": 0, "max_tokens": 40, "stop": ["ing", "."], "include_stop_str_in_output": True},
    {"temperature": 0.8, "seed": 1, "max_tokens": 12, "n": 3, "logprobs": 2},
    {"temperature": 1.0, "seed": 2, "max_tokens": 12, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"seed": 3, "max_tokens": 12, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0, "max_tokens": 6, "logit_bias": {"40": 100}, "min_tokens": 3, "ignore_eos": True},
    {"temperature": 0, "max_tokens": 2, "prompt_logprobs": 1},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_completions_are_those_of_generate(tiny: LLM, served: Served, setting: dict[str, Any]) -> None:
    outputs = tiny.generate(PROMPTS, SamplingParams(**setting))
    body = setting | {"prompt": PROMPTS, "return_token_ids": True}
    found = served.post(COMPLETIONS, body)["choices"]
    expected = [completion for output in outputs for completion in output.outputs]
    assert [choice["token_ids"] for choice in found] == [completion.token_ids for completion in expected]
    assert [choice["text"] for choice in found] == [completion.text for completion in expected]
    assert [choice["finish_reason"] for choice in found] == [completion.finish_reason for completion in expected]
    assert [choice["stop_reason"] for choice in found] == [completion.stop_reason for completion in expected]
    for choice, completion in zip(found, expected, strict=True):
        own = [row[token].logprob for row, token in zip(completion.logprobs or [], completion.token_ids, strict=False)]
        assert ((choice["logprobs"] or {}).get("token_logprobs") or []) == own
    if "prompt_logprobs" in setting:
        scores = [msgspec.to_builtins(output.prompt_logprobs, str_keys=True) for output in outputs]
        assert [choice["prompt_logprobs"] for choice in found] == scores
    else:
        tokens: dict[int, list[int]] = {}
        for chunk in served.post(COMPLETIONS, body | {"stream": True}):
            choice = chunk["choices"][0]
            tokens.setdefault(choice["index"], []).extend(choice["token_ids"])
        assert [tokens[index] for index in sorted(tokens)] == [completion.token_ids for completion in expected]


FEATURES: dict[str, Any] = {
    "temperature": 0,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.2,
    "presence_penalty": 1.5,
    "frequency_penalty": -1.5,
    "repetition_penalty": 1.4,
    "logit_bias": {"40": 50},
    "n": 2,
    "stop": ["e", " the"],
    "stop_token_ids": [5, 6],
    "min_tokens": 3,
    "ignore_eos": True,
    "logprobs": 2,
    "prompt_logprobs": 1,
    "echo": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "return_tokens_as_token_ids": True,
    "prompt": [[1, 2, 3], [4]],
}
CONTRADICTORY = {("temperature", "n")}  # greedy completions would all be the same


def test_every_pair_of_features_gives_an_answer_and_the_same_as_a_stream(served: Served) -> None:
    """A pair that is valid may not fail anywhere, and the engine goes on: the last answer is as the first."""
    plain = {"prompt": PROMPTS[0], "max_tokens": 5, "seed": 9}
    before = served.post(COMPLETIONS, plain)["choices"]
    for pair in combinations(FEATURES, 2):
        if pair in CONTRADICTORY:
            continue
        body = plain | {name: FEATURES[name] for name in pair}
        choices = served.post(COMPLETIONS, body)["choices"]
        assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}, pair
        if "prompt_logprobs" in pair:  # cannot be streamed
            continue
        texts, reasons = dict.fromkeys(range(len(choices)), ""), {}
        for chunk in served.post(COMPLETIONS, body | {"stream": True}):
            [choice] = chunk["choices"]
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"]
        assert list(texts.values()) == [choice["text"] for choice in choices], pair
        assert [reasons[index] for index in texts] == [choice["finish_reason"] for choice in choices], pair
    assert served.post(COMPLETIONS, plain)["choices"] == before


def test_token_ids_are_prompts_too(tiny: LLM, served: Served) -> None:
    ids = [tiny.get_tokenizer().encode(prompt) for prompt in PROMPTS]
    outputs = tiny.generate(ids, SamplingParams(temperature=0, max_tokens=8))
    found = served.post(COMPLETIONS, {"prompt": ids, "temperature": 0, "max_tokens": 8})["choices"]
    assert [choice["text"] for choice in found] == [output.outputs[0].text for output in outputs]


def test_chats_are_those_of_chat(tiny: LLM, served: Served) -> None:
    for setting in ({"temperature": 0, "max_tokens": 10}, {"seed": 4, "max_tokens": 10, "n": 2}):
        expected = tiny.chat(CONVERSATION, SamplingParams(**setting), chat_template=TEMPLATE)[0]
        body = setting | {"messages": CONVERSATION}
        choices = served.post(CHAT, body)["choices"]
        assert [choice["message"]["content"] for choice in choices] == [each.text for each in expected.outputs]
        texts = dict.fromkeys(range(len(choices)), "")
        for chunk in served.post(CHAT, body | {"stream": True}):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
        assert list(texts.values()) == [each.text for each in expected.outputs]


def test_loglikelihoods_are_prompt_logprobs(tiny: LLM, served: Served) -> None:
    """As lm-eval asks for them."""
    ids = [tiny.get_tokenizer().encode(prompt) for prompt in PROMPTS]
    outputs = tiny.generate(ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    body = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    for prompt, output, choice in zip(ids, outputs, served.post(COMPLETIONS, body)["choices"], strict=True):
        assert output.prompt_logprobs is not None
        expected = [
            row[token].logprob for token, row in zip(prompt[1:], output.prompt_logprobs[1:], strict=True) if row
        ]
        assert choice["logprobs"]["token_logprobs"][1:-1] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_leaves_no_sequence_and_no_page(served: Served, stream: bool) -> None:
    async def run() -> None:
        body = {"prompt": PROMPTS[0], "max_tokens": 1000, "n": 4, "ignore_eos": True, "stream": stream}
        connections = [Connection(served.app, COMPLETIONS, body) for _ in range(6)]
        while (await status()).num_running == 0:
            pass
        for connection in connections:
            connection.go_away()
            await connection.task
        left = await status()
        while left.num_running or left.num_waiting:
            left = await status()
        stats = await served.llm.fleet_stats()
        assert sum(member.pages_used for member in stats.members) == 0
        await until(lambda: served.app.state.server.admission.num_sequences == 0)

    async def status() -> EngineStatus:
        return await served.llm.ask(StatusQuery(), EngineStatus)

    served.run(run())
