"""Fields of OpenAI's and vLLM's requests that hetis does not have: accepted only with a value that asks for nothing.

Refusing the others is what tells a client that an answer would not be what it asked for.
"""

from typing import Any

from hetis.server.errors import ApiError, shown, shown_name

_TOOLS = "hetis does not parse tool calls"
_GUIDED = "hetis does not constrain outputs to a grammar"
_TEXT = "hetis serves text only"

_Table = dict[str, tuple[tuple[Any, ...], str]]  # field -> (values that ask for nothing besides null, why not others)
_BOTH: _Table = {
    "use_beam_search": ((False,), "hetis has no beam search"),
    "length_penalty": ((1.0,), "hetis has no beam search"),
    "early_stopping": ((False,), "hetis has no beam search"),
    "best_of": ((1,), "hetis returns every sequence that it generates; give n"),
    "response_format": (({"type": "text"},), _GUIDED),
    "structured_outputs": ((), _GUIDED),
    "guided_json": ((), _GUIDED),
    "guided_regex": ((), _GUIDED),
    "guided_choice": ((), _GUIDED),
    "guided_grammar": ((), _GUIDED),
    "guided_decoding_backend": ((), _GUIDED),
    "guided_whitespace_pattern": ((), _GUIDED),
    "allowed_token_ids": ((), "hetis does not restrict the vocabulary; logit_bias can forbid tokens"),
    "bad_words": (([],), "hetis does not forbid words; logit_bias can forbid tokens"),
    "logprob_token_ids": ((), "hetis returns log-probabilities of the best tokens only"),
    "truncate_prompt_tokens": ((), "hetis never cuts a prompt; shorten it"),
    "truncation_side": (("left", "right"), "hetis never cuts a prompt; shorten it"),
    "priority": ((0,), "hetis serves requests in the order of their arrival"),
    "cache_salt": ((), "hetis shares no cache between requests"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), "hetis stores nothing"),
    "stream_interval": ((1,), "every token is streamed at once"),
    "return_prompt_text": ((False,), "/tokenize gives the tokens of a conversation"),
    "return_token_offsets": ((False,), "hetis returns no offsets"),
    "return_mm_kwargs": ((True,), _TEXT),
    "routed_experts_prompt_start": ((0,), "hetis returns no experts"),
    "kv_transfer_params": (({},), "hetis transfers no caches between servers"),
    "ec_transfer_params": (({},), "hetis transfers no caches between servers"),
    "vllm_xargs": (({},), "hetis has no extensions of that kind"),
    "logits_processors": (([],), "hetis runs no code of a request"),
    "watermarking": ((False,), "hetis has no watermarks"),
    "thinking_token_budget": ((-1,), "hetis does not tell thinking from answers"),
    "repetition_detection": ((), "hetis does not detect repetition; give a penalty"),
}
_COMPLETIONS: _Table = {
    "suffix": (("",), "hetis does not fill in the middle"),
    "prompt_embeds": ((), "hetis takes text or token ids"),
}
_CHAT: _Table = {
    "tools": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "parallel_tool_calls": ((True, False), _TOOLS),
    "functions": (([],), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "echo": ((False,), "/v1/completions can echo a prompt"),
    "modalities": ((["text"],), _TEXT),
    "audio": ((), _TEXT),
    "prediction": ((), "hetis does not speculate"),
    "web_search_options": ((), "hetis does not search"),
    "verbosity": (("medium",), "the model has no such setting"),
    "reasoning_effort": ((), "pass it to the chat template by chat_template_kwargs if the template knows it"),
    "include_reasoning": ((True, False), "hetis does not tell thinking from answers"),
    "documents": (([],), "pass them to the chat template by chat_template_kwargs if the template knows them"),
    "chat_template": ((), "a template of a request is not run; the server's option --chat-template sets it"),
    "mm_processor_kwargs": (({},), _TEXT),
    "media_io_kwargs": (({},), _TEXT),
}
COMPLETIONS = _BOTH | _COMPLETIONS
CHAT = _BOTH | _CHAT
TOKENIZE: _Table = {name: _CHAT[name] for name in ("tools", "chat_template", "mm_processor_kwargs", "media_io_kwargs")}


def check_unsupported(table: _Table, field: str, value: Any) -> None:
    """Raises ApiError 400 for a field that no request has, and for one of `table` that asks for something.

    Null asks for nothing, whatever the field.
    """
    if value is None:
        return
    name = shown_name(field)
    if field not in table:
        raise ApiError(400, f"{name} is not a field of this request; leave it out.", name)
    harmless, reason = table[field]
    if not any(_equal(value, one) for one in harmless):
        raise ApiError(400, f"{name} is {shown(value)}, which is not supported: {reason}; leave it out.", name)


def schema_of(table: _Table) -> dict[str, Any]:
    """JSON schemas of the fields, by name."""
    return {
        field: {"enum": [None, *harmless], "description": f"Not supported: {reason}."}
        for field, (harmless, reason) in table.items()
    }


def _equal(value: Any, harmless: Any) -> bool:
    """Whether two JSON values are equal; in Python 0 and False are."""
    return bool(value == harmless) and isinstance(value, bool) == isinstance(harmless, bool)
