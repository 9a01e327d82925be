"""Conversations are rendered as by transformers; wrong ones are refused with their index."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hetis.frontend.chat import as_conversations, render
from tests.checkpoints import make_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% if message.tool_calls %}{{ message.tool_calls }}{% endif %}</s>"
    "{% endfor %}{% if tools %}{{ tools | length }} tools{% endif %}{% if thinking %}<think>{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


def tokenizer(template: str | None = TEMPLATE) -> Any:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(331), bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = template
    return wrapped


def rendered(conversation: Any, index: int = 0, template: str | None = TEMPLATE, **arguments: Any) -> str:
    defaults: dict[str, Any] = {
        "chat_template": None,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "tools": None,
        "chat_template_kwargs": None,
    }
    return render(tokenizer(template), index, conversation, **(defaults | arguments))


def test_one_conversation_or_many() -> None:
    assert as_conversations([USER]) == [[USER]]
    assert as_conversations([[USER], [USER, BOT]]) == [[USER], [USER, BOT]]
    assert as_conversations([]) == []


def test_arguments_of_the_template() -> None:
    assert rendered([USER]) == "<s><user>Hi</s><assistant>"
    assert rendered([USER, BOT], add_generation_prompt=False) == "<s><user>Hi</s><assistant>Hello</s>"
    goes_on = rendered([USER, BOT], add_generation_prompt=False, continue_final_message=True)
    assert goes_on == "<s><user>Hi</s><assistant>Hello"
    assert rendered([USER], chat_template="{{ messages[0].content }}!") == "Hi!"
    assert rendered([USER], tools=[TOOL], add_generation_prompt=False).endswith("1 tools")
    assert rendered([USER], chat_template_kwargs={"thinking": True}).endswith("<think><assistant>")
    calls = {"role": "assistant", "content": None, "tool_calls": ["f()"]}
    assert "['f()']" in rendered([USER, calls])


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, "b"]
    assert rendered([{"role": "user", "content": parts}]) == "<s><user>a\nb</s><assistant>"


@pytest.mark.parametrize(
    ("conversation", "arguments", "words"),
    [
        ([USER], {"template": None}, "^the tokenizer has no chat template"),
        ([USER], {"continue_final_message": True}, "^continue_final_message needs add_generation_prompt=False"),
        ("Hi", {}, "^conversation 3 is a str"),
        ([], {}, "^conversation 3 is empty"),
        ([USER, "Hi"], {}, "^message 1 of conversation 3 is a str"),
        ([{"content": "Hi"}], {}, "^message 0 of conversation 3 has no 'role'"),
        ([{"role": "user"}], {}, "^message 0 of conversation 3 has no 'content'"),
        ([{"role": "user", "content": 5}], {}, "^message 0 of conversation 3 has an int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "part of type 'image_url'; give text parts only"),
        ([{"role": "user", "content": "\ud800"}], {}, "^message 0 of conversation 3 is not valid Unicode"),
        (
            [{"role": "tool", "content": "x"}],
            {},
            r"^conversation 3 is refused by the chat template \(no tools here",
        ),
        ([USER], {"chat_template": "{% if %}"}, "^conversation 3 is refused by the chat template"),
    ],
)
def test_wrong_conversations_are_refused(conversation: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rendered(conversation, 3, **arguments)


@pytest.mark.parametrize("messages", ["Hi", USER, None, 5])
def test_messages_of_a_wrong_type_are_refused(messages: Any) -> None:
    with pytest.raises(ValueError, match=r"^messages is (a \w+|an int|None); give a list"):
        as_conversations(messages)
