"""What the benchmark asks a server before it measures: readiness, model, and how prompts can be made."""

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hetis.bench_serve.errors import RequestError
from hetis.bench_serve.http_client import HttpClient
from hetis.bench_serve.prompts import LocalCodec, PromptMaker

POLL_SECONDS = 0.5
UNAVAILABLE = (502, 503, 504)
# the largest id that a server is known to accept bounds the vocabulary from below: a server refuses ids outside of it
LARGEST_IDS = (100_000, 50_000, 30_000, 10_000, 1_000, 250)
NUM_WORDS = 400


class ModelInfo(NamedTuple):
    """A model of the server. `root`: where it was loaded from; None if the server does not say."""

    id: str
    root: str | None
    max_model_len: int | None


async def find_model(client: HttpClient, name: str | None, timeout: float) -> ModelInfo:
    """The model called `name`, or the server's first one. Waits up to `timeout` seconds for the server.

    A name that the server does not list may be one that it accepts nevertheless: the first request will tell. Raises
    ValueError if the server does not answer in time, refuses the question, or lists no model and none is named.
    """
    status, body = await _wait_for_models(client, timeout)
    if status in (401, 403):
        raise ValueError(f"the server refuses /v1/models with {status}: give its key by --api-key or OPENAI_API_KEY.")
    data = body.get("data") if isinstance(body, dict) and status == 200 else None
    listed = [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []
    for one in listed:
        if isinstance(one.get("id"), str) and name in (None, one["id"]):
            root, longest = one.get("root"), one.get("max_model_len")
            has_length = isinstance(longest, int) and longest > 0
            return ModelInfo(one["id"], root if isinstance(root, str) else None, longest if has_length else None)
    if name is None:
        raise ValueError(f"/v1/models answers with {status} and names no model; check the address, or give --model.")
    return ModelInfo(name, None, None)


async def _wait_for_models(client: HttpClient, timeout: float) -> tuple[int, Any]:
    """The answer to /v1/models, asked until there is one that is not "unavailable"."""
    deadline = time.perf_counter() + timeout
    while True:
        try:
            status, body = await client.json("GET", "/v1/models")
            reason = f"HTTP {status}"
            if status not in UNAVAILABLE:
                return status, body
        except RequestError as error:
            reason = str(error)
        if time.perf_counter() + POLL_SECONDS > deadline:
            raise ValueError(
                f"the server is not ready after {timeout:g} s ({reason}); start it, or check --base-url, --host and "
                "--port."
            )
        await asyncio.sleep(POLL_SECONDS)


async def prompt_maker(
    client: HttpClient, model: ModelInfo, tokenizer: str | None, is_chat: bool, endpoint: str
) -> PromptMaker:
    """How prompts for `model` can be made: with its tokenizer, as token ids, or with the server's tokenizer.

    `tokenizer`: directory or hub id; None: the model's root if that is a directory here. Raises ValueError if the
    server offers none of these ways.
    """
    if tokenizer is None and model.root is not None and Path(model.root).is_dir():
        tokenizer = model.root
    if tokenizer is not None and (codec := _local_codec(tokenizer)) is not None:
        return PromptMaker(codec.vocabulary(), codec, f"text by the tokenizer {tokenizer}")
    if not is_chat:
        for largest in LARGEST_IDS:
            if await _accepts(client, endpoint, model.id, largest):
                how = f"token ids up to {largest}, which the server accepts"
                return PromptMaker(range(largest // 10, largest + 1), None, how)
    remote = RemoteCodec(client, model.id)
    if vocabulary := await remote.vocabulary():
        return PromptMaker(vocabulary, remote, "text by the server's /tokenize and /detokenize")
    what = "text" if is_chat else "token ids"
    raise ValueError(f"the server has neither /tokenize nor takes {what} of unknown length; give --tokenizer DIR.")


def _local_codec(tokenizer: str) -> LocalCodec | None:
    """The tokenizer in a directory; None if it has none."""
    from hetis.frontend.tokenizer import load_tokenizer

    found = load_tokenizer(tokenizer, None)
    return None if found is None else LocalCodec(found)


async def _accepts(client: HttpClient, endpoint: str, model: str, id: int) -> bool:
    """Whether the server completes a prompt of this token id."""
    payload = {"model": model, "prompt": [id, id], "max_tokens": 1, "temperature": 0}
    try:
        status, _ = await client.json("POST", endpoint, payload)
    except RequestError:
        return False
    return status == 200


class RemoteCodec:
    """The tokenizer of the server, by vLLM's /tokenize and /detokenize or llama.cpp's of the same names."""

    def __init__(self, client: HttpClient, model: str) -> None:
        self._client, self._model, self._is_llama_cpp = client, model, False

    async def vocabulary(self) -> list[int]:
        """Tokens of made-up words; empty if the server has no tokenizer to ask."""
        draw, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
        words = " ".join("".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(NUM_WORDS))
        for self._is_llama_cpp in (False, True):
            try:
                if ids := sorted(set(await self.encode(words))):
                    await self.decode(ids)
                    return ids
            except (RequestError, ValueError):
                continue
        return []

    async def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        payload: dict[str, Any] = {"content": text, "add_special": False}
        if not self._is_llama_cpp:
            payload = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return [int(id) for id in await self._ask("/tokenize", payload, "tokens")]

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        payload: dict[str, Any] = {"tokens": list(ids)}
        if not self._is_llama_cpp:
            payload["model"] = self._model
        return str(await self._ask("/detokenize", payload, "content" if self._is_llama_cpp else "prompt"))

    async def _ask(self, path: str, payload: dict[str, Any], key: str) -> Any:
        status, body = await self._client.json("POST", path, payload)
        if status != 200 or not isinstance(body, dict) or key not in body:
            raise ValueError(f"{path} answers with {status} and no {key}; give --tokenizer DIR.")
        return body[key]
