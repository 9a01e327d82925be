"""Requests and responses of `/tokenize` and `/detokenize`, in vLLM's form."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from hetis.server.protocol.fields import Flag, Messages, Object, Text
from hetis.server.protocol.reading import Body
from hetis.server.protocol.unsupported import TOKENIZE

_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}


class _TokenizeBody(Body, kw_only=True, frozen=True):
    unsupported = TOKENIZE

    model: Text = None
    add_special_tokens: Flag = None  # null: for a prompt, not for messages
    return_token_strs: Flag = None


class TokenizePrompt(_TokenizeBody, kw_only=True, frozen=True):
    prompt: Annotated[str, Meta(description="a text")]


class TokenizeMessages(_TokenizeBody, kw_only=True, frozen=True):
    messages: Messages
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    chat_template_kwargs: Object = None


class TokenizeResponse(Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body, kw_only=True, frozen=True):
    model: Text = None
    tokens: Annotated[Any, Meta(extra_json_schema=_IDS, description="a list of token ids")]


class DetokenizeResponse(Struct, kw_only=True):
    prompt: str
