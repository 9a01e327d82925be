"""`/v1/completions`: texts that continue prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from hetis.core.outputs import CompletionOutput, Logprob
from hetis.core.sampling_params import SamplingParams
from hetis.frontend.requests import Piece, Request
from hetis.server.generation import GenerationResponse, Task
from hetis.server.intake import checked_request, prompts_of
from hetis.server.models import served_name
from hetis.server.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from hetis.server.protocol.reading import parse, read_json
from hetis.server.protocol.sampling import sampling_params
from hetis.server.protocol.schemas import POST_ERRORS, answers, takes
from hetis.server.writing import Counts, Envelope, PromptLogprobs, TokenTexts, encode, finite, prompt_logprobs

if TYPE_CHECKING:
    from hetis.server.context import Server

PATH = "/v1/completions"
_EVENTS = "Events with what is new of each choice, then `data: [DONE]`; an event with `error` if the engine fails."
router = APIRouter()


@router.post(
    PATH,
    openapi_extra=takes(CompletionRequest),
    responses=POST_ERRORS | answers(CompletionResponse, "The completions.", stream=_EVENTS),
)
async def create_completion(request: HttpRequest) -> Response:
    """Continues texts or token ids."""
    server: Server = request.app.state.server
    body = parse(CompletionRequest, await read_json(request))
    envelope = Envelope("cmpl", "text_completion", served_name(server, body.model), server.fingerprint)
    body.check_stream()
    params = params_of(body, server.sampling_defaults)
    prompts = prompts_of(body.prompt)
    task = Task(
        PATH,
        params,
        is_stream=bool(body.stream),
        num_prompts=len(prompts),
        size=sum(map(len, prompts)),
        make_requests=lambda: [
            checked_request(
                server,
                prompt,
                params,
                request_id=f"{envelope.id}-{index}",
                name="prompt" if len(prompts) == 1 else f"prompt {index}",
                field="prompt",
                add_special_tokens=body.add_special_tokens is not False,
                max_tokens=body.max_tokens,
            )
            for index, prompt in enumerate(prompts)
        ],
        make_writer=lambda requests: CompletionWriter(envelope, body, requests, server.llm.tokenizer),
    )
    return GenerationResponse(server, request, task)


def params_of(body: CompletionRequest, defaults: dict[str, Any]) -> SamplingParams:
    """With `echo` the log-probabilities of the prompt are those asked for of the output, as in OpenAI and vLLM."""
    wants_prompt_alone = body.echo and body.max_tokens == 0 and not isinstance(body.max_tokens, bool)
    scored = body.prompt_logprobs
    if scored is None and body.echo:
        scored = body.logprobs
    return sampling_params(
        body,
        {name: value for name, value in defaults.items() if name != "max_tokens"},
        prompt_logprobs=scored,
        max_tokens=1 if wants_prompt_alone else body.max_tokens,
    )


class CompletionWriter:
    """Chunks and answers of the prompts of one request."""

    def __init__(
        self, envelope: Envelope, body: CompletionRequest, requests: Sequence[Request], tokenizer: Any
    ) -> None:
        self._envelope, self._body, self._requests = envelope, body, requests
        self._num_completions = requests[0].num_completions
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer, bool(body.return_tokens_as_token_ids))
        self._hides_output = bool(body.echo) and body.max_tokens == 0
        self._counts = Counts(requests)
        self._offsets: dict[int, int] = {}  # by choice that has begun: characters in the tokens so far
        self._early: dict[int, list[Piece]] = {}  # by prompt: pieces that wait for the prompt's log-probabilities

    # --- stream -------------------------------------------------------------------------------------------------------

    def chunk(self, prompt: int, piece: Piece) -> bytes:
        """With `echo` only the first completion scores the prompt, so pieces of the others may have to wait for it."""
        if self._body.echo and self._is_scoring(prompt) and piece.finish_reason != "abort":
            self._early.setdefault(prompt, []).append(piece)
            return b""
        early = self._early.pop(prompt, [])
        return b"".join([self._chunk(prompt, each) for each in (*early, piece)])

    def _chunk(self, prompt: int, piece: Piece) -> bytes:
        index = prompt * self._num_completions + piece.index
        is_first = index not in self._offsets
        if self._hides_output:
            piece = Piece(piece.prompt_index, piece.index, "", [], [], piece.finish_reason)
        self._counts.add(index, piece)
        choice = CompletionChoice(index, piece.text)
        token_ids, logprobs = piece.token_ids, piece.logprobs
        if is_first:
            self._offsets[index] = 0
            self._begin(choice, prompt)
        if self._body.logprobs is not None:
            rows: PromptLogprobs = list(logprobs or ())
            if is_first and self._body.echo:
                token_ids, rows = self._with_prompt(prompt, token_ids, rows)
            choice.logprobs = self._logprobs(token_ids, rows, self._offsets[index])
            self._offsets[index] += sum(map(len, choice.logprobs.tokens))
        if self._body.return_token_ids:
            choice.token_ids = piece.token_ids
        if piece.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
        counts = self._counts.of_choice(prompt, index) if self._body.wants_usage_always else None
        is_last = piece.finish_reason is not None and not self._body.wants_usage
        return self._envelope.chunk(choice, counts, is_last=is_last)

    def _is_scoring(self, prompt: int) -> bool:
        request = self._requests[prompt]
        return request.prompt_logprobs is not None and len(request.prompt_logprobs) < len(request.prompt_token_ids)

    def _begin(self, choice: CompletionChoice, prompt: int) -> None:
        """Adds what the first chunk of a choice has besides."""
        if self._body.echo:
            choice.text = self._echo(prompt) + choice.text
        if self._body.return_token_ids:
            choice.prompt_token_ids = self._requests[prompt].prompt_token_ids

    def end(self) -> bytes:
        return self._envelope.usage_chunk(self._counts.total()) if self._body.wants_usage else b""

    # --- answer -------------------------------------------------------------------------------------------------------

    def response(self) -> bytes:
        choices = [
            self._choice(prompt, prompt * self._num_completions + output.index, output)
            for prompt, request in enumerate(self._requests)
            for output in request.output().outputs
        ]
        envelope = self._envelope
        return encode(
            CompletionResponse(
                id=envelope.id,
                created=envelope.created,
                model=envelope.model,
                choices=choices,
                usage=self._counts.total(),
                system_fingerprint=envelope.fingerprint,
            )
        )

    def _choice(self, prompt: int, index: int, output: CompletionOutput) -> CompletionChoice:
        whole = Piece(prompt, output.index, output.text, output.token_ids, output.logprobs, output.finish_reason)
        if self._hides_output:
            whole = Piece(prompt, output.index, "", [], [], output.finish_reason)
        self._counts.add(index, whole)
        choice = CompletionChoice(index, whole.text, finish_reason=output.finish_reason, stop_reason=output.stop_reason)
        self._begin(choice, prompt)
        if self._body.logprobs is not None:
            token_ids, rows = whole.token_ids, list(whole.logprobs or ())
            choice.logprobs = self._logprobs(*self._with_prompt(prompt, token_ids, rows), 0)
        if self._body.return_token_ids:
            choice.token_ids = whole.token_ids
        scores = self._requests[prompt].prompt_logprobs
        choice.prompt_logprobs = UNSET if self._body.prompt_logprobs is None else prompt_logprobs(scores or [])
        return choice

    # --- both ---------------------------------------------------------------------------------------------------------

    def _echo(self, prompt: int) -> str:
        request = self._requests[prompt]
        if request.prompt is not None:
            return request.prompt
        if self._tokenizer is None:
            return ""
        skip = request.params.skip_special_tokens
        return str(self._tokenizer.backend_tokenizer.decode(request.prompt_token_ids, skip_special_tokens=skip))

    def _with_prompt(
        self, prompt: int, token_ids: list[int], rows: Sequence[dict[int, Logprob] | None]
    ) -> tuple[list[int], PromptLogprobs]:
        """Tokens and log-probabilities of the prompt, if it is echoed, and of the output.

        A request that was aborted before its prompt was scored has none for the prompt.
        """
        if not self._body.echo:
            return token_ids, list(rows)
        request = self._requests[prompt]
        scores = request.prompt_logprobs or []
        unscored = [None] * (len(request.prompt_token_ids) - len(scores))
        return [*request.prompt_token_ids, *token_ids], [*scores, *unscored, *rows]

    def _logprobs(self, token_ids: list[int], rows: PromptLogprobs, offset: int) -> CompletionLogprobs:
        found = CompletionLogprobs([], [], [], [])
        for token_id, row in zip(token_ids, rows, strict=True):
            text = self._text(token_id, row)
            found.tokens.append(text)
            found.text_offset.append(offset)
            found.token_logprobs.append(None if row is None else finite(row[token_id].logprob))
            found.top_logprobs.append(None if row is None else self._best(row))
            offset += len(text)
        return found

    def _text(self, token_id: int, row: dict[int, Logprob] | None) -> str:
        return self._texts.decoded(token_id) if row is None else self._texts.of(token_id, row[token_id].decoded_token)

    def _best(self, row: dict[int, Logprob]) -> dict[str, float]:
        """By text; the better one of two tokens with the same text, which both are parts of characters."""
        best: dict[str, float] = {}
        for token_id, entry in row.items():
            text = self._texts.of(token_id, entry.decoded_token)
            best[text] = max(best.get(text, finite(entry.logprob)), finite(entry.logprob))
        return best
