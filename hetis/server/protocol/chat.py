"""Request and response of `/v1/chat/completions`."""

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from hetis.core.outputs import Logprob
from hetis.server.protocol.fields import Flag, MaxTokens, Messages, Object, sampling
from hetis.server.protocol.sampling import GenerationBody
from hetis.server.protocol.unsupported import CHAT
from hetis.server.protocol.usage import Usage


class ChatRequest(GenerationBody, kw_only=True, frozen=True):
    unsupported = CHAT

    messages: Messages
    logprobs: Flag = None
    top_logprobs: Annotated[Any, sampling("logprobs")] = None
    max_completion_tokens: MaxTokens = None  # the newer name of max_tokens; the one that counts if both are given
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    chat_template_kwargs: Object = None  # variables for the chat template


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float  # nats
    bytes: list[int]  # of the token; several tokens may share a character


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ContentLogprob]  # one per token


class ChatMessage(msgspec.Struct):
    content: str
    role: str = "assistant"


class ChatDelta(msgspec.Struct):
    """What is new of a message. Its role comes with its first token."""

    content: str
    role: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatStreamChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None  # null while it goes on
    stop_reason: int | str | UnsetType | None = UNSET  # the stop string or token id; with the finish_reason
    token_ids: list[int] | UnsetType = UNSET


class ChatResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int  # Unix time, seconds
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_logprobs: list[dict[int, Logprob] | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
