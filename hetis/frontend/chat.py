"""Conversations: checked, reduced to text, and rendered by a chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from hetis.frontend.prompts import check_text, kind_of

Message = Mapping[str, Any]  # OpenAI's form: "role", "content", and other keys that the template uses
Conversation = Sequence[Message]


def as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """A list of conversations from one conversation or several. Raises ValueError for other types."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ValueError(f"messages is {kind_of(messages)}; give a list of messages, or a list of such lists.")
    if any(isinstance(message, Mapping) for message in messages):
        return [messages]  # type: ignore[list-item]
    return list(messages)  # type: ignore[arg-type]


def render(
    tokenizer: Any,
    index: int,
    conversation: Conversation,
    *,
    chat_template: str | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
    tools: list[dict[str, Any]] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> str:
    """The text of a conversation, rendered by the chat template.

    Raises ValueError, with the index of the conversation, for wrong messages and for errors of the template.
    """
    if chat_template is None and tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; give chat_template, or use generate.")
    if add_generation_prompt and continue_final_message:
        raise ValueError("continue_final_message needs add_generation_prompt=False, as no new message begins.")
    messages = _plain_messages(index, conversation)
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **(chat_template_kwargs or {}),
        )
    except Exception as error:  # errors of jinja2, of transformers, and of expressions in the template
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"conversation {index} is refused by the chat template ({reason}).") from error
    return check_text(f"conversation {index}", text)


def _plain_messages(index: int, conversation: Conversation) -> list[dict[str, Any]]:
    if not isinstance(conversation, Sequence) or isinstance(conversation, str | bytes) or not conversation:
        what = "empty" if conversation == [] else kind_of(conversation)
        raise ValueError(f"conversation {index} is {what}; give a list of messages with 'role' and 'content'.")
    return [_plain_message(f"message {n} of conversation {index}", message) for n, message in enumerate(conversation)]


def _plain_message(name: str, message: Message) -> dict[str, Any]:
    """The message with its content as text; several parts are joined by line breaks, as in vLLM."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} is {kind_of(message)}; give a dict with 'role' and 'content'.")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{name} has no 'role'; give 'system', 'user' or 'assistant'.")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "\n".join(_part(name, part) for part in content)
    if content is None and "tool_calls" not in message:
        raise ValueError(f"{name} has no 'content'; give text.")
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{name} has {kind_of(content)} as 'content'; give text, or a list of text parts.")
    return {**message, "content": "" if content is None else check_text(name, content)}


def _part(name: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"{name} has a part of type {kind!r}; give text parts only: {{'type': 'text', 'text': ...}}.")
