"""Streams: the form of their events, and that they say what the answer without a stream says."""

import asyncio
from itertools import product
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.server.stand_in import TEMPLATE, StandIn, app_of, events, openai_client, post

CONVERSATION = [{"role": "user", "content": "Hi"}]
LLM = StandIn()
APP = app_of(LLM, chat_template=TEMPLATE)


def stream(path: str, **body: Any) -> list[Any]:
    response = post(APP, path, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    return events(response.text)


def answer(path: str, **body: Any) -> Any:
    response = post(APP, path, body)
    assert response.status_code == 200, response.text
    return response.json()


# --- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "kind", "prefix"),
    [
        ("/v1/completions", {"prompt": ["Hello", "you"], "n": 2}, "text_completion", "cmpl-"),
        ("/v1/chat/completions", {"messages": CONVERSATION, "n": 2}, "chat.completion.chunk", "chatcmpl-"),
    ],
)
def test_what_all_chunks_share(path: str, body: dict[str, Any], kind: str, prefix: str) -> None:
    chunks = stream(path, max_tokens=5, **body)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == kind
    assert chunks[0]["id"].startswith(prefix)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    for index in {chunk["choices"][0]["index"] for chunk in chunks}:
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [chunk["choices"][0]["finish_reason"] for chunk in own] == [None] * 4 + ["length"]
        assert ["system_fingerprint" in chunk for chunk in own] == [False] * 4 + [True]
        assert ["stop_reason" in chunk["choices"][0] for chunk in own] == [False] * 4 + [True]


def test_the_role_comes_with_the_first_token() -> None:
    chunks = stream("/v1/chat/completions", messages=CONVERSATION, max_tokens=4, n=2)
    for index in (0, 1):
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert deltas[0]["role"] == "assistant"
        assert deltas[0]["content"]
        assert all("role" not in delta for delta in deltas[1:])


@pytest.mark.parametrize("body", [{"prompt": ["Hello", [1, 2, 3]], "n": 2}, {"messages": CONVERSATION, "n": 2}])
def test_usage_comes_last_and_without_choices(body: dict[str, Any]) -> None:
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    *chunks, last = stream(path, max_tokens=3, stream_options={"include_usage": True}, **body)
    assert last["choices"] == []
    assert last["usage"] == answer(path, max_tokens=3, **body)["usage"]
    assert last["usage"]["completion_tokens"] == 3 * len({chunk["choices"][0]["index"] for chunk in chunks})
    assert last["system_fingerprint"]
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    assert not any("usage" in chunk or "system_fingerprint" in chunk for chunk in chunks)


def test_usage_on_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = stream("/v1/completions", prompt=[1, 2, 3], max_tokens=3, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]
    assert [chunk["usage"]["total_tokens"] for chunk in chunks] == [4, 5, 6]
    assert last["usage"] == chunks[-1]["usage"]
    options = {"continuous_usage_stats": True, "include_obfuscation": False}
    alone = stream("/v1/completions", prompt="a", max_tokens=1, stream_options=options)
    assert "usage" not in alone[-1], "it goes with include_usage, as in vLLM"


def test_token_ids_of_a_stream() -> None:
    first, *others = stream("/v1/completions", prompt=[5, 6], max_tokens=3, return_token_ids=True)
    assert first["choices"][0]["prompt_token_ids"] == [5, 6]
    assert all("prompt_token_ids" not in chunk["choices"][0] for chunk in others)
    found = [token for chunk in (first, *others) for token in chunk["choices"][0]["token_ids"]]
    choice = answer("/v1/completions", prompt=[5, 6], max_tokens=3, return_token_ids=True)["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5, 6], found)


# --- the same as without a stream -------------------------------------------------------------------------------------


def joined(chunks: list[Any]) -> dict[int, Any]:
    """Text, finish and stop reason, and log-probabilities of every choice, from its chunks."""
    found: dict[int, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"]["content"]
            one = found.setdefault(choice["index"], {"text": "", "logprobs": None})
            one["text"] += text
            one["finish_reason"], one["stop_reason"] = choice["finish_reason"], choice.get("stop_reason")
            for name, values in (choice["logprobs"] or {}).items():
                one["logprobs"] = one["logprobs"] or {}
                one["logprobs"][name] = one["logprobs"].get(name, []) + values
    return found


def whole(answered: Any) -> dict[int, Any]:
    return {
        choice["index"]: {
            "text": choice["text"] if "text" in choice else choice["message"]["content"],
            "logprobs": choice["logprobs"],
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
        }
        for choice in answered["choices"]
    }


PROMPTS = ["Hello world", [[3, 4, 5], [6, 7]], ["Grüße, Jürgen ❤", "x"]]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"logprobs": 0},
    {"logprobs": 3},
    {"echo": True},
    {"echo": True, "logprobs": 1},
    {"echo": True, "max_tokens": 0, "logprobs": 2},
    {"logprobs": 1, "return_tokens_as_token_ids": True},
    {"stop": ["e", "é"], "logprobs": 1},
    {"stop": "e", "include_stop_str_in_output": True, "min_tokens": 5},
    {"stop_token_ids": list(range(1, 600))},
    {"skip_special_tokens": False, "spaces_between_special_tokens": False},
    {"logit_bias": {"5": 2}, "seed": 4, "temperature": 0.5},
]


@pytest.mark.parametrize(("prompt", "n"), list(product(PROMPTS, (1, 3))), ids=str)
def test_completions_streamed_and_not(prompt: Any, n: int) -> None:
    for setting in SETTINGS:
        body = {"prompt": prompt, "n": n, "max_tokens": 20, "seed": 1} | setting
        answered = answer("/v1/completions", **body)
        assert joined(stream("/v1/completions", **body)) == whole(answered), setting
        assert len(answered["choices"]) == n * (len(prompt) if isinstance(prompt, list) else 1)
        assert [choice["index"] for choice in answered["choices"]] == list(range(len(answered["choices"])))


@pytest.mark.parametrize("n", [1, 3])
def test_chats_streamed_and_not(n: int) -> None:
    for setting in ({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 4}, {"stop": ["a", "ing"]}):
        body = {"messages": CONVERSATION, "n": n, "max_tokens": 20, "seed": 2} | setting
        assert joined(stream("/v1/chat/completions", **body)) == whole(answer("/v1/chat/completions", **body)), setting


def test_the_seed_decides_and_not_the_company() -> None:
    alone = [answer("/v1/completions", prompt=prompt, max_tokens=9, seed=5)["choices"][0] for prompt in ("ab", "cd")]
    together = answer("/v1/completions", prompt=["ab", "cd"], max_tokens=9, seed=5)["choices"]
    assert [choice["text"] for choice in alone] == [choice["text"] for choice in together]
    assert alone[0]["text"] != alone[1]["text"]


# --- the client of OpenAI ---------------------------------------------------------------------------------------------


async def _with_openai(client: AsyncOpenAI) -> None:
    models = await client.models.list()
    assert [model.id for model in models.data] == ["tiny", "other/tiny"]
    done = await client.completions.create(model="tiny", prompt="Hello", max_tokens=4, logprobs=2, seed=3)
    assert done.usage is not None
    assert done.usage.completion_tokens == 4
    chunks = [
        chunk
        async for chunk in await client.completions.create(
            model="tiny", prompt="Hello", max_tokens=4, seed=3, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == done.choices[0].text
    assert chunks[-1].usage == done.usage
    chat = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        max_completion_tokens=4,
        logprobs=True,
        top_logprobs=1,
        extra_body={"top_k": 3, "min_p": 0.1, "ignore_eos": True},
    )
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].logprobs is not None
    text = [
        chunk.choices[0].delta.content
        async for chunk in await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, stream=True
        )
    ]
    assert "".join(part or "" for part in text) == chat.choices[0].message.content


def test_with_the_client_of_openai() -> None:
    async def run() -> None:
        async with openai_client(APP) as client:
            await _with_openai(client)

    asyncio.run(run())
