"""From the prompts of a body to requests of the front end. Every mistake is an `ApiError` that names the field."""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hetis.core.sampling_params import SamplingParams
from hetis.frontend.requests import Request
from hetis.server.errors import ApiError, shown
from hetis.server.protocol.fields import MAX_PROMPTS
from hetis.server.protocol.sampling import named_by_client

if TYPE_CHECKING:
    from hetis.server.context import Server

# characters of a text over those of as many longest tokens: normalisation may shorten a text, by composing characters
_SLACK = 4


def prompts_of(given: Any) -> list[Any]:
    """The prompts of a body, each text or a list; what is in the lists is checked later. Raises ApiError 400."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise ApiError(400, f"prompt is {shown(given)}; give a text, token ids, or a list of these.", "prompt")
    if not isinstance(given[0], str | list):
        return [given]
    if len(given) > MAX_PROMPTS:
        raise ApiError(400, f"prompt has {len(given)} prompts; give at most {MAX_PROMPTS} in one request.", "prompt")
    for index, prompt in enumerate(given):
        if not isinstance(prompt, str | list):
            raise ApiError(400, f"prompt {index} is {shown(prompt)}; give a text or a list of token ids.", "prompt")
    return given


def checked_request(
    server: "Server",
    prompt: Any,
    params: SamplingParams,
    *,
    request_id: str,
    name: str,
    field: str,
    add_special_tokens: bool,
    max_tokens: int | None,
    names: Mapping[str, str] | None = None,
) -> Request:
    """The request for one prompt, tokenised. Raises ApiError 400.

    `name`: of the prompt in sentences; `field`: of the body. `max_tokens`: as the client asks for it; `names`: as in
    `sampling_params`.
    """
    names, llm = names or {}, server.llm
    _check_length(name, field, prompt, llm.max_model_len, llm.tokenizer)
    try:
        request = llm.make_request(
            prompt, params, request_id=request_id, name=name, add_special_tokens=add_special_tokens
        )
    except ValueError as error:
        raise named_by_client(error, names, otherwise=field) from None
    _check_room(len(request.prompt_token_ids), max_tokens, llm.max_model_len, names.get("max_tokens", "max_tokens"))
    return request


def _check_length(name: str, field: str, prompt: Any, context: int, tokenizer: Any) -> None:
    """Raises ApiError for a prompt that is much too long, before it is looked at: tokenising takes 1 us per character.

    The others are refused once they are token ids.
    """
    if isinstance(prompt, str) and tokenizer is not None:
        longest = context * _SLACK * _longest_token(tokenizer)
    elif isinstance(prompt, list):
        longest = context
    else:
        return
    if len(prompt) > longest:
        unit = "characters" if isinstance(prompt, str) else "tokens"
        message = f"{name} has {len(prompt)} {unit}, but max_model_len is {context} tokens; shorten the prompt."
        raise ApiError(400, message, field, "context_length_exceeded")


@lru_cache(maxsize=4)
def _longest_token(tokenizer: Any) -> int:
    """Characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def _check_room(length: int, max_tokens: int | None, context: int, name: str) -> None:
    """Raises ApiError if the context cannot hold the prompt and as many tokens as the client asks for."""
    if max_tokens is not None and length + max_tokens > context:
        raise ApiError(
            400,
            f"{name} is {max_tokens}, but the prompt has {length} tokens and the context {context}; "
            f"ask for at most {context - length}, or shorten the prompt.",
            name,
            "context_length_exceeded",
        )
