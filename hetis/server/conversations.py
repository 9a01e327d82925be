"""Conversations of requests: rendered by the model's chat template."""

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hetis.frontend.chat import render
from hetis.server.errors import ApiError, refused, shown_name

if TYPE_CHECKING:
    from hetis.server.context import Server

_HIDDEN = "messages cannot be rendered by the model's chat template; check their roles and order, and the variables."
_OF_TEMPLATES = ("messages", "conversation", "bos_token", "eos_token", "raise_exception", "strftime_now")


def rendered(
    server: "Server",
    messages: Any,
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> str:
    """The text of a conversation. Raises ApiError 400 that names the field.

    A message is continued without a new one's beginning: `add_generation_prompt` is then False unless it was given.
    """
    tokenizer, template = server.llm.tokenizer, server.options.chat_template
    if tokenizer is None or (template is None and tokenizer.chat_template is None):
        message = "the model has no chat template; use /v1/completions, or start the server with --chat-template."
        raise ApiError(400, message, "messages")
    _check_variables(tokenizer, chat_template_kwargs or {})
    if add_generation_prompt and continue_final_message:
        message = "continue_final_message needs add_generation_prompt to be false, as no new message begins."
        raise ApiError(400, message, "continue_final_message")
    begins = not continue_final_message if add_generation_prompt is None else add_generation_prompt
    try:
        return render(
            tokenizer,
            0,
            messages,
            chat_template=template,
            add_generation_prompt=begins,
            continue_final_message=bool(continue_final_message),
            tools=None,
            chat_template_kwargs=chat_template_kwargs,
        )
    except ValueError as error:
        refusal = refused(error, (), "messages", _HIDDEN)
        raise ApiError(400, refusal.message.replace("conversation 0", "messages"), "messages") from None


def size_of(messages: Any) -> int:
    """About the number of characters of a conversation."""
    if isinstance(messages, str):
        return len(messages)
    if isinstance(messages, dict):
        return sum(map(size_of, messages.values()))
    return sum(map(size_of, messages)) if isinstance(messages, list) else 0


def _check_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Raises ApiError for names that would change how the template is run, and not only what it sees."""
    taken = _arguments(tokenizer.__class__)
    for name in variables:
        if name in taken or not name.isidentifier() or name.startswith("_"):
            raise ApiError(
                400,
                f"chat_template_kwargs has {shown_name(name)}, which is no variable of a template; leave it out.",
                "chat_template_kwargs",
            )


@lru_cache(maxsize=4)
def _arguments(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.apply_chat_template).parameters) | frozenset(_OF_TEMPLATES)
