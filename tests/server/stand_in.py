"""A stand-in for `AsyncLLM`: the real intake, requests and detokeniser, and tokens that depend on the seed alone.

Token i of a sequence is drawn by a hash of prompt, seed and i, so an answer does not depend on how it is asked for, nor
on what runs beside it. Its log-probabilities are of the same kind. All sequences advance one token at a time, as in
the engine.
"""

import asyncio
import hashlib
import json
from array import array
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI
from openai import AsyncOpenAI

from hetis.core.config import EngineConfig
from hetis.core.messages import AddRequest, EngineReady, TokenOutput
from hetis.core.outputs import MODEL_FAILED
from hetis.core.sampling_params import SamplingParams
from hetis.core.token_logprobs import TokenLogprobs
from hetis.frontend.errors import EngineDeadError
from hetis.frontend.intake import Intake
from hetis.frontend.requests import Piece, Request
from hetis.frontend.tokenizer import load_tokenizer
from hetis.server.app import build_app
from hetis.server.options import ServerOptions

VOCAB_SIZE, CONTEXT, END = 3072, 1024, 0
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'thief' %}{{ raise_exception('roles must be honest') }}"
    "{% endif %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"
    "{% if shout %}LOUD{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENIZER: Any = load_tokenizer(None, None)


class StandIn:
    """What the server uses of `AsyncLLM`.

    - may_run: cleared, requests wait in the queue.
    - fails_after: number of tokens after which the engine is dead; None: never.
    - errors_after: number of tokens after which a sequence ends with an error; None: never. refuses: it is a fault of
      the request, not of the model.
    - fixed_tokens: what every sequence begins with.
    - is_aborting: all that runs ends with the reason "abort".
    - panics: the tokenizer fails like Rust code does.
    - params: of the requests that were made; aborted: requests whose stream was closed before its end.
    """

    def __init__(self, tokenizer_is_missing: bool = False, **options: Any) -> None:
        self.config = EngineConfig(**options)
        self.tokenizer: Any = None if tokenizer_is_missing else TOKENIZER
        self.max_model_len, self.vocab_size, self.eos_token_ids = CONTEXT, VOCAB_SIZE, [END]
        self.is_ready = self.is_open = True
        self.dead_reason: str | None = None
        self.status = None
        self.may_run = asyncio.Event()
        self.may_run.set()
        self.fails_after: int | None = None
        self.errors_after: int | None = None
        self.refuses = False
        self.panics = self.is_aborting = False
        self.fixed_tokens: list[int] = []
        self.params: list[SamplingParams] = []
        self.aborted: list[Request] = []
        self.num_running = 0
        ready = EngineReady(max_model_len=CONTEXT, vocab_size=VOCAB_SIZE, ledger="", eos_token_ids=[END])
        self._intake = Intake(self.config, self.tokenizer, ready)

    def make_request(self, prompt: Any, params: SamplingParams | None = None, **options: Any) -> Request:
        request = self._intake.make(prompt, params, **options)
        self.params.append(request.params)
        return request

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        self.num_running += 1
        try:
            await self.may_run.wait()
            sequences = [_Sequence(message, self.fixed_tokens) for message in request.messages()]
            if request.num_completions > 1:  # so that the first one, which scores the prompt, is not the first to come
                sequences.append(sequences.pop(0))
            while not request.finished:
                for piece in request.abort() if self.is_aborting else ():
                    yield piece
                for sequence in sequences:
                    for piece in self._step(request, sequence):
                        yield piece
                await asyncio.sleep(0)
        finally:
            self.num_running -= 1
            if not request.finished:
                self.aborted.append(request)

    def _step(self, request: Request, sequence: "_Sequence") -> list[Piece]:
        if self.panics:
            raise _Panic
        if self.fails_after is not None and sequence.num_tokens >= self.fails_after:
            self.dead_reason = "rank 0 was killed"
            raise EngineDeadError(self.dead_reason)
        if self.errors_after is not None and sequence.num_tokens >= self.errors_after:
            error = "it can never run." if self.refuses else MODEL_FAILED
            new = TokenOutput(id=sequence.id, token_ids=[], finish_reason="error", error=error)
        else:
            new = sequence.next()
        piece, _ = request.add(new)
        return [] if piece is None else [piece]


class _Panic(BaseException):
    pass


class _Sequence:
    def __init__(self, message: AddRequest, fixed: list[int]) -> None:
        self._fixed = fixed
        self.id, self._params, self._prompt = message.id, message.params, message.token_ids
        self._key = hashlib.sha256(repr((message.token_ids, message.seed if message.params.seed else 0)).encode())
        self.num_tokens = 0

    def next(self) -> TokenOutput:
        self.num_tokens += 1
        token = self._draw(self.num_tokens)
        reason = stop = None
        params = self._params
        if self.num_tokens > params.min_tokens and token in params.stop_token_ids:
            reason, stop = "stop", token
        elif self.num_tokens >= min(params.max_tokens or CONTEXT, CONTEXT - len(self._prompt)):
            reason = "length"
        scored = None
        if self.num_tokens == 1 and params.prompt_logprobs is not None:
            scored = [_logprobs(token, params.prompt_logprobs) for token in self._prompt[1:]]
        return TokenOutput(
            id=self.id,
            token_ids=[token],
            logprobs=None if params.logprobs is None else [_logprobs(token, params.logprobs)],
            prompt_logprobs=scored,
            finish_reason=reason,
            stop_reason=stop,
        )

    def _draw(self, position: int) -> int:
        if position <= len(self._fixed):
            return self._fixed[position - 1]
        digest = self._key.copy()
        digest.update(position.to_bytes(4, "little"))
        return 1 + int.from_bytes(digest.digest()[:4], "little") % (VOCAB_SIZE - 1)


def _logprobs(token: int, count: int) -> TokenLogprobs:
    """The token is the best one if it is even, else of rank 50."""
    best = [(token + 7 * rank) % VOCAB_SIZE for rank in range(1, count + 1)]
    if token % 2 == 0 and best:
        best[0] = token
    values = [-0.5 if token % 2 == 0 else -9.25, *(-0.5 * rank for rank in range(1, count + 1))]
    return TokenLogprobs(
        token_ids=array("i", [token, *best]).tobytes(),
        values=array("f", values).tobytes(),
        token_rank=1 if token % 2 == 0 else 50,
    )


# --- clients ----------------------------------------------------------------------------------------------------------


def app_of(llm: StandIn, **options: Any) -> FastAPI:
    return build_app(llm, ServerOptions(**({"served_model_names": ("tiny", "other/tiny")} | options)))  # type: ignore[arg-type]


def http_client(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server", timeout=30)


def post(app: FastAPI, path: str, body: Any, **options: Any) -> httpx.Response:
    """The answer to one request. `body`: JSON, or bytes as they are."""

    async def ask() -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        async with http_client(app) as client:
            return await client.post(path, content=content, headers=headers, **options)

    return asyncio.run(ask())


def get(app: FastAPI, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with http_client(app) as client:
            return await client.get(path)

    return asyncio.run(ask())


def openai_client(app: FastAPI) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="-", base_url="http://server/v1", http_client=http_client(app), max_retries=0)


def events(text: str) -> list[Any]:
    """The JSON of all events of a stream; the last event must be [DONE]."""
    *parts, last, rest = text.split("\n\n")
    assert last == "data: [DONE]", text[-300:]
    assert not rest
    return [msgspec.json.decode(part.removeprefix("data: ")) for part in parts]
