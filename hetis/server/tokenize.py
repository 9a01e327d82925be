"""`/tokenize` and `/detokenize`: token ids of a text or a conversation, and back."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hetis.core.request import check_token_ids
from hetis.frontend.prompts import check_text
from hetis.frontend.tokenizer import encode as encode_text
from hetis.server.conversations import rendered, size_of
from hetis.server.errors import ApiError, refused, shown
from hetis.server.generation import LONG_PROMPT
from hetis.server.models import served_name
from hetis.server.protocol.reading import parse, read_json
from hetis.server.protocol.schemas import POST_ERRORS, answers, takes
from hetis.server.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeMessages,
    TokenizePrompt,
    TokenizeResponse,
)
from hetis.server.writing import encode

if TYPE_CHECKING:
    from hetis.server.context import Server

_HIDDEN = "prompt cannot be encoded by the model's tokenizer; change the text."
router = APIRouter()
T = TypeVar("T")


@router.post(
    "/tokenize",
    openapi_extra=takes(TokenizePrompt, TokenizeMessages),
    responses=POST_ERRORS | answers(TokenizeResponse, "The token ids."),
)
async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of a conversation as the chat template renders it."""
    server: Server = request.app.state.server
    values = await read_json(request)
    kind: type[TokenizeMessages | TokenizePrompt] = TokenizeMessages if "messages" in values else TokenizePrompt
    body = parse(kind, values)
    served_name(server, body.model)
    size = size_of(body.messages) if isinstance(body, TokenizeMessages) else len(body.prompt)
    return await _in_thread_if(size > LONG_PROMPT, lambda: _tokenized(server, body))


@router.post(
    "/detokenize",
    openapi_extra=takes(DetokenizeRequest),
    responses=POST_ERRORS | answers(DetokenizeResponse, "The text."),
)
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    server: Server = request.app.state.server
    body = parse(DetokenizeRequest, await read_json(request))
    served_name(server, body.model)
    tokens = body.tokens
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ApiError(400, f"tokens is {shown(tokens)}; give a list of token ids.", "tokens")
    return await _in_thread_if(len(tokens) > LONG_PROMPT, lambda: _detokenized(server, tokens))


async def _in_thread_if(is_long: bool, work: Callable[[], Response]) -> Response:
    return await asyncio.to_thread(work) if is_long else work()


def _tokenized(server: "Server", body: TokenizePrompt | TokenizeMessages) -> Response:
    tokenizer = _tokenizer(server)
    adds_special = body.add_special_tokens
    if isinstance(body, TokenizeMessages):
        text = rendered(
            server,
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        ids = _encoded(tokenizer, text, bool(adds_special))
    else:
        ids = _encoded(tokenizer, body.prompt, adds_special is not False)
    strings = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    found = TokenizeResponse(count=len(ids), max_model_len=server.llm.max_model_len, tokens=ids, token_strs=strings)
    return Response(encode(found), media_type="application/json")


def _encoded(tokenizer: Any, text: str, adds_special: bool) -> list[int]:
    try:
        return encode_text(tokenizer, check_text("prompt", text), adds_special)
    except ValueError as error:
        raise refused(error, (), "prompt", _HIDDEN) from None


def _detokenized(server: "Server", tokens: list[int]) -> Response:
    tokenizer = _tokenizer(server)
    if tokens:
        try:
            check_token_ids("tokens", tokens, server.llm.vocab_size)
        except ValueError as error:
            raise ApiError(400, str(error), "tokens") from None
    text = str(tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=False))
    return Response(encode(DetokenizeResponse(prompt=text)), media_type="application/json")


def _tokenizer(server: "Server") -> Any:
    if server.llm.tokenizer is None:
        raise ApiError(400, "the model has no tokenizer; start the server with one.", "model")
    return server.llm.tokenizer
