"""Request and response of `/v1/completions`."""

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from hetis.core.outputs import Logprob
from hetis.server.protocol.fields import Flag, Prompt, sampling
from hetis.server.protocol.sampling import GenerationBody
from hetis.server.protocol.unsupported import COMPLETIONS
from hetis.server.protocol.usage import Usage

_ZERO = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, {"type": "null"}]}


class CompletionRequest(GenerationBody, kw_only=True, frozen=True):
    unsupported = COMPLETIONS

    prompt: Prompt
    echo: Flag = None  # begin the text, and the log-probabilities, with the prompt
    logprobs: Annotated[Any, sampling("logprobs")] = None
    # 0 asks for the prompt alone, with echo
    max_tokens: Annotated[
        Any, msgspec.Meta(extra_json_schema=_ZERO, description="an integer of 1 or more, or 0 with echo")
    ] = None


class CompletionLogprobs(msgspec.Struct):
    """One entry per token, of the prompt as well with `echo`.

    `text_offset`: number of characters in the tokens before, of this choice.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]  # null for the first token of a prompt
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]  # the token and the best ones, by their text


class CompletionChoice(msgspec.Struct):
    """A completion, or what is new of it in a chunk of a stream."""

    index: int  # prompt x n + completion
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None  # stop, length or abort; null while it goes on
    stop_reason: int | str | UnsetType | None = UNSET  # the stop string or token id; with the finish_reason
    token_ids: list[int] | UnsetType = UNSET  # with `return_token_ids`, as the next
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[int, Logprob] | None] | UnsetType = UNSET


class CompletionResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int  # Unix time, seconds
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
