"""`/v1/chat/completions`: the next message of a conversation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from hetis.core.outputs import CompletionOutput, Logprob
from hetis.core.sampling_params import SamplingParams
from hetis.frontend.requests import Piece, Request
from hetis.server.conversations import rendered, size_of
from hetis.server.errors import ApiError
from hetis.server.generation import GenerationResponse, Task
from hetis.server.intake import checked_request
from hetis.server.models import served_name
from hetis.server.protocol.chat import (
    ChatChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    ChatStreamChoice,
    ContentLogprob,
    TokenLogprob,
)
from hetis.server.protocol.reading import parse, read_json
from hetis.server.protocol.sampling import sampling_params
from hetis.server.protocol.schemas import POST_ERRORS, answers, takes
from hetis.server.writing import Counts, Envelope, TokenTexts, encode, finite, prompt_logprobs

if TYPE_CHECKING:
    from hetis.server.context import Server

PATH = "/v1/chat/completions"
_EVENTS = "Events with what is new of each message, then `data: [DONE]`; an event with `error` if the engine fails."
router = APIRouter()


@router.post(
    PATH,
    openapi_extra=takes(ChatRequest),
    responses=POST_ERRORS | answers(ChatResponse, "The next messages.", stream=_EVENTS),
)
async def create_chat_completion(request: HttpRequest) -> Response:
    """Answers a conversation, which the model's chat template turns into a prompt."""
    server: Server = request.app.state.server
    body = parse(ChatRequest, await read_json(request))
    envelope = Envelope("chatcmpl", "chat.completion.chunk", served_name(server, body.model), server.fingerprint)
    body.check_stream()
    names = _names(body)
    params = params_of(body, server.sampling_defaults, names)
    task = Task(
        PATH,
        params,
        is_stream=bool(body.stream),
        num_prompts=1,
        size=size_of(body.messages),
        make_requests=lambda: [_request(server, body, params, names, envelope.id)],
        make_writer=lambda requests: ChatWriter(envelope, body, requests, server.llm.tokenizer),
    )
    return GenerationResponse(server, request, task)


def _names(body: ChatRequest) -> dict[str, str]:
    """The client's names of parameters."""
    names = {"logprobs": "top_logprobs"}
    return names if body.max_completion_tokens is None else names | {"max_tokens": "max_completion_tokens"}


def params_of(body: ChatRequest, defaults: dict[str, Any], names: dict[str, str]) -> SamplingParams:
    """Without max_tokens the answer may fill the context."""
    if body.top_logprobs not in (None, 0) and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs; set logprobs to true.", "top_logprobs")
    wanted = body.max_completion_tokens
    return sampling_params(
        body,
        {"max_tokens": None} | defaults,
        names,
        logprobs=(0 if body.top_logprobs is None else body.top_logprobs) if body.logprobs else None,
        max_tokens=body.max_tokens if wanted is None else wanted,
    )


def _request(
    server: "Server", body: ChatRequest, params: SamplingParams, names: dict[str, str], answer_id: str
) -> Request:
    text = rendered(
        server,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    return checked_request(
        server,
        text,
        params,
        request_id=answer_id,
        name="messages",
        field="messages",
        add_special_tokens=bool(body.add_special_tokens),  # the template has inserted them
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        names=names,
    )


class ChatWriter:
    """Chunks and answers of one conversation."""

    def __init__(self, envelope: Envelope, body: ChatRequest, requests: Sequence[Request], tokenizer: Any) -> None:
        self._envelope, self._body, self._request = envelope, body, requests[0]
        self._texts = TokenTexts(tokenizer, bool(body.return_tokens_as_token_ids))
        self._num_best = body.top_logprobs or 0
        self._counts = Counts(requests)
        self._begun: set[int] = set()

    def chunk(self, prompt: int, piece: Piece) -> bytes:
        index, body = piece.index, self._body
        self._counts.add(index, piece)
        choice = ChatStreamChoice(index, ChatDelta(piece.text))
        first = index not in self._begun
        if first:
            self._begun.add(index)
            choice.delta.role = "assistant"
        if body.logprobs:
            choice.logprobs = self._logprobs(piece.token_ids, piece.logprobs or [])
        if body.return_token_ids:
            choice.token_ids = piece.token_ids
        if piece.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
        counts = self._counts.of_choice(0, index) if body.wants_usage_always else None
        is_last = piece.finish_reason is not None and not body.wants_usage
        prompt_ids = self._request.prompt_token_ids if first and body.return_token_ids else None
        return self._envelope.chunk(choice, counts, is_last=is_last, prompt_token_ids=prompt_ids)

    def end(self) -> bytes:
        return self._envelope.usage_chunk(self._counts.total()) if self._body.wants_usage else b""

    def response(self) -> bytes:
        envelope, scores, request = self._envelope, self._request.prompt_logprobs, self._request
        choices = [self._choice(output) for output in request.output().outputs]
        return encode(
            ChatResponse(
                id=envelope.id,
                created=envelope.created,
                model=envelope.model,
                choices=choices,
                usage=self._counts.total(),
                system_fingerprint=envelope.fingerprint,
                prompt_logprobs=UNSET if scores is None else prompt_logprobs(scores),
                prompt_token_ids=request.prompt_token_ids if self._body.return_token_ids else UNSET,
            )
        )

    def _choice(self, output: CompletionOutput) -> ChatChoice:
        self._counts.add(output.index, Piece(0, output.index, "", output.token_ids))
        return ChatChoice(
            output.index,
            ChatMessage(output.text),
            self._logprobs(output.token_ids, output.logprobs or []) if self._body.logprobs else None,
            output.finish_reason,
            output.stop_reason,
            output.token_ids if self._body.return_token_ids else UNSET,
        )

    def _logprobs(self, token_ids: list[int], rows: list[dict[int, Logprob]]) -> ChatLogprobs:
        return ChatLogprobs([self._content(token, row) for token, row in zip(token_ids, rows, strict=True)])

    def _content(self, token_id: int, row: dict[int, Logprob]) -> ContentLogprob:
        """A token, and the best ones by rank; the token itself is among them only if it is one of the best."""
        ranked = sorted(row.items(), key=lambda found: found[1].rank or 0)
        best = ranked if self._num_best == -1 else ranked[: int(self._num_best)]
        own = self._token(token_id, row[token_id])
        return ContentLogprob(own.token, own.logprob, own.bytes, [self._token(*found) for found in best])

    def _token(self, token_id: int, entry: Logprob) -> TokenLogprob:
        text = self._texts.of(token_id, entry.decoded_token)
        return TokenLogprob(text, finite(entry.logprob), self._texts.bytes_of(token_id, entry.decoded_token))
