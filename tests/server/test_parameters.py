"""Every field of a request: what is accepted reaches `SamplingParams`, what is not is a 400 that names the field."""

from typing import Any

import httpx
import pytest

from hetis.core.sampling_params import SamplingParams
from hetis.server.protocol.chat import ChatRequest
from hetis.server.protocol.completions import CompletionRequest
from hetis.server.protocol.unsupported import CHAT, COMPLETIONS
from tests.server.stand_in import TEMPLATE, StandIn, app_of, post

COMPLETION = {"prompt": "Hello", "max_tokens": 1}
CONVERSATION = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
PATHS = {"completions": ("/v1/completions", COMPLETION), "chat": ("/v1/chat/completions", CONVERSATION)}
BOTH = pytest.mark.parametrize("endpoint", PATHS)

ACCEPTED: list[tuple[str, Any, dict[str, Any]]] = [  # field, value, what SamplingParams then has
    ("n", 2, {"n": 2}),
    ("n", 2.0, {"n": 2}),
    ("temperature", 0, {"temperature": 0.0}),
    ("temperature", 0.7, {"temperature": 0.7}),
    ("temperature", 2, {"temperature": 2.0}),
    ("top_p", 0.25, {"top_p": 0.25}),
    ("top_p", 1, {"top_p": 1.0}),
    ("top_k", 5, {"top_k": 5}),
    ("top_k", 0, {"top_k": 0}),
    ("top_k", -1, {"top_k": 0}),
    ("min_p", 0.1, {"min_p": 0.1}),
    ("presence_penalty", -2, {"presence_penalty": -2.0}),
    ("frequency_penalty", 2, {"frequency_penalty": 2.0}),
    ("repetition_penalty", 1.3, {"repetition_penalty": 1.3}),
    ("seed", 7, {"seed": 7}),
    ("seed", -1, {"seed": None}),
    ("seed", 2**63 - 1, {"seed": 2**63 - 1}),
    ("seed", -(2**63), {"seed": -(2**63)}),
    ("stop", "x", {"stop": ("x",)}),
    ("stop", ["x", "yz"], {"stop": ("x", "yz")}),
    ("stop", [], {"stop": ()}),
    ("stop", ["\x00"], {"stop": ("\x00",)}),
    ("stop_token_ids", [1, 2], {"stop_token_ids": (1, 2)}),
    ("max_tokens", 3, {"max_tokens": 3}),
    ("min_tokens", 1, {"min_tokens": 1}),
    ("ignore_eos", True, {"ignore_eos": True}),
    ("prompt_logprobs", 3, {"prompt_logprobs": 3}),
    ("logit_bias", {"5": 1.5}, {"logit_bias": {5: 1.5}}),
    ("logit_bias", {"5": -1000}, {"logit_bias": {5: -100.0}}),
    ("logit_bias", {}, {"logit_bias": {}}),
    ("skip_special_tokens", False, {"skip_special_tokens": False}),
    ("spaces_between_special_tokens", False, {"spaces_between_special_tokens": False}),
    ("include_stop_str_in_output", True, {"include_stop_str_in_output": True}),
]
WITHOUT_EFFECT: list[tuple[str, Any]] = [
    ("stream", False),
    ("model", "tiny"),
    ("add_special_tokens", True),
    ("return_token_ids", False),
    ("return_tokens_as_token_ids", False),
    ("user", "somebody"),
    ("metadata", {"a": {"b": ["c"]}}),
    ("request_id", "r1"),
    ("session_id", "s1"),
    ("safety_identifier", "s"),
    ("prompt_cache_key", "k"),
    ("prompt_cache_retention", "24h"),
]
OF_CHAT: list[tuple[str, Any, dict[str, Any]]] = [
    ("logprobs", True, {"logprobs": 0}),
    ("logprobs", False, {"logprobs": None}),
    ("top_logprobs", 0, {"logprobs": None}),
    ("max_completion_tokens", 5, {"max_tokens": 5}),
    ("add_generation_prompt", False, {}),
    ("continue_final_message", True, {}),
    ("chat_template_kwargs", {"shout": True}, {}),
]
OF_COMPLETIONS: list[tuple[str, Any, dict[str, Any]]] = [
    ("logprobs", 2, {"logprobs": 2}),
    ("logprobs", 0, {"logprobs": 0}),
    ("echo", True, {"prompt_logprobs": None}),
    ("prompt", ["a", "b"], {}),
    ("prompt", [1, 2], {}),
    ("prompt", [[1, 2], [3]], {}),
]
WRONG: list[tuple[str, Any]] = [
    *((name, value) for name in ("n", "top_k", "min_tokens", "max_tokens", "seed") for value in ("1", True, 1.5, [])),
    *((name, "x") for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")),
    ("n", 0),
    ("n", -1),
    ("n", 16_385),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("seed", 2**63),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 2**63),
    ("max_tokens", 2000),
    ("min_tokens", -1),
    ("min_tokens", 5),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", -2),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["a", "b", "c", "d", "e"]),
    ("stop", 5),
    ("stop", "x" * 300),
    ("stop_token_ids", [3072]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", "1"),
    ("logit_bias", {"3072": 1}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": "a"}),
    ("logit_bias", [1]),
    ("ignore_eos", 1),
    ("ignore_eos", "true"),
    ("skip_special_tokens", 0),
    ("spaces_between_special_tokens", "no"),
    ("include_stop_str_in_output", 1.0),
    ("add_special_tokens", "x"),
    ("return_token_ids", 1),
    ("return_tokens_as_token_ids", 1),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("stream_options", {"include_usage": 1}),
    ("stream_options", {"more": True}),
    ("stream_options", {"include_obfuscation": True}),
    ("model", 5),
    ("user", 5),
    ("user", "x" * 1000),
    ("metadata", "x"),
]


LLM = StandIn()
APP = app_of(LLM, chat_template=TEMPLATE)


def answer(endpoint: str, **fields: Any) -> httpx.Response:
    path, body = PATHS[endpoint]
    LLM.params.clear()
    return post(APP, path, body | fields)


def check_accepted(endpoint: str, field: str, value: Any, expected: dict[str, Any]) -> None:
    response = answer(endpoint, **{field: value})
    assert response.status_code == 200, response.text
    assert {name: getattr(LLM.params[-1], name) for name in expected} == expected


def check_refused(endpoint: str, field: str, value: Any) -> None:
    response = answer(endpoint, **{field: value})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert field in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    assert not LLM.num_running


@BOTH
@pytest.mark.parametrize(("field", "value", "expected"), ACCEPTED)
def test_what_is_accepted_reaches_the_engine(endpoint: str, field: str, value: Any, expected: dict[str, Any]) -> None:
    check_accepted(endpoint, field, value, expected)


@pytest.mark.parametrize(("field", "value", "expected"), OF_COMPLETIONS)
def test_fields_of_completions(field: str, value: Any, expected: dict[str, Any]) -> None:
    check_accepted("completions", field, value, expected)


@pytest.mark.parametrize(("field", "value", "expected"), OF_CHAT)
def test_fields_of_chat(field: str, value: Any, expected: dict[str, Any]) -> None:
    check_accepted("chat", field, value, expected)


@BOTH
@pytest.mark.parametrize(("field", "value"), WITHOUT_EFFECT)
def test_what_changes_no_parameter(endpoint: str, field: str, value: Any) -> None:
    assert answer(endpoint, **{field: value}).status_code == 200
    assert LLM.params == [SamplingParams(max_tokens=1)]


@BOTH
def test_null_is_the_default_of_every_field(endpoint: str) -> None:
    kind = CompletionRequest if endpoint == "completions" else ChatRequest
    nulls = {name: None for name in kind.__struct_fields__ if name not in PATHS[endpoint][1]}
    assert answer(endpoint, **nulls).status_code == 200
    assert LLM.params == [SamplingParams(max_tokens=1)]


@BOTH
@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_named(endpoint: str, field: str, value: Any) -> None:
    check_refused(endpoint, field, value)


WRONG_IN_COMPLETIONS: list[tuple[str, Any]] = [
    ("logprobs", 21),
    ("logprobs", True),
    ("logprobs", -2),
    ("echo", "x"),
    ("prompt", None),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [""]),
    ("prompt", 5),
    ("prompt", {"a": 1}),
    ("prompt", [1, "a"]),
    ("prompt", ["a", 1]),
    ("prompt", [1, True]),
    ("prompt", [1.5]),
    ("prompt", [-1]),
    ("prompt", [3072]),
    ("prompt", [[1], [3072]]),
    ("prompt", [1] * 1024),
    ("prompt", ["a"] * 1025),
]


@pytest.mark.parametrize(("field", "value"), WRONG_IN_COMPLETIONS, ids=lambda value: str(value)[:30])
def test_what_is_wrong_in_completions(field: str, value: Any) -> None:
    check_refused("completions", field, value)


WRONG_IN_CHAT: list[tuple[str, Any]] = [
    ("logprobs", 1),
    ("top_logprobs", 2),
    ("max_completion_tokens", 0),
    ("max_completion_tokens", 2000),
    ("messages", None),
    ("messages", []),
    ("messages", "Hi"),
    ("messages", {"role": "user", "content": "x"}),
    ("messages", ["Hi"]),
    ("messages", [{"content": "x"}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": 5, "content": "x"}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
    ("messages", [{"role": "thief", "content": "x"}]),
    ("messages", [{"role": "user", "content": "a " * 2000}]),
    ("add_generation_prompt", "x"),
    ("continue_final_message", 1),
    ("chat_template_kwargs", []),
    ("chat_template_kwargs", {"tokenize": True}),
    ("chat_template_kwargs", {"chat_template": "x"}),
    ("chat_template_kwargs", {"not a name": 1}),
    ("chat_template_kwargs", {"__class__": 1}),
]


@pytest.mark.parametrize(("field", "value"), WRONG_IN_CHAT, ids=lambda value: str(value)[:30])
def test_what_is_wrong_in_chat(field: str, value: Any) -> None:
    check_refused("chat", field, value)


def test_top_logprobs_is_the_name_in_chat() -> None:
    error = answer("chat", logprobs=True, top_logprobs=21).json()["error"]
    assert error["param"] == "top_logprobs"
    assert error["message"].startswith("top_logprobs is 21, but must be at most 20")


def test_a_message_is_continued_without_a_new_one() -> None:
    error = answer("chat", continue_final_message=True, add_generation_prompt=True).json()["error"]
    assert error["param"] == "continue_final_message"


TABLES = {"completions": COMPLETIONS, "chat": CHAT}


@BOTH
def test_unsupported_fields_that_ask_for_nothing(endpoint: str) -> None:
    for field, (harmless, _) in TABLES[endpoint].items():
        for value in (None, *harmless):
            assert answer(endpoint, **{field: value}).status_code == 200, (field, value)
            assert LLM.params == [SamplingParams(max_tokens=1)]


@BOTH
@pytest.mark.parametrize("value", ["something", 7, ["x"], {"type": "json_object"}], ids=str)
def test_unsupported_fields_that_ask_for_something(endpoint: str, value: Any) -> None:
    for field in TABLES[endpoint]:
        check_refused(endpoint, field, value)


@BOTH
@pytest.mark.parametrize("field", ["frobnicate", "Temperature", "max-tokens", "", "\ud800", "a\nb", "x" * 500])
def test_unknown_fields(endpoint: str, field: str) -> None:
    error = answer(endpoint, **{field: 1})
    assert error.status_code == 400
    message = error.json()["error"]["message"]
    assert message.endswith("is not a field of this request; leave it out.")
    assert len(message) < 200


@BOTH
def test_a_field_of_a_later_api_that_is_null(endpoint: str) -> None:
    assert answer(endpoint, frobnicate=None).status_code == 200


@BOTH
def test_another_model_is_not_found(endpoint: str) -> None:
    response = answer(endpoint, model="gpt-9")
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": 'model is "gpt-9", but this server has "tiny", "other/tiny".',
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_any_of_the_names_is_echoed() -> None:
    assert answer("completions", model="other/tiny").json()["model"] == "other/tiny"
    assert answer("completions").json()["model"] == "tiny"


def test_defaults_of_max_tokens() -> None:
    llm = StandIn()
    app = app_of(llm, chat_template=TEMPLATE)
    post(app, "/v1/completions", {"prompt": "Hello"})
    answered = post(app, "/v1/chat/completions", {"messages": CONVERSATION["messages"]}).json()
    assert [params.max_tokens for params in llm.params] == [16, None]
    assert answered["usage"]["total_tokens"] == 1024


def test_sampling_defaults_of_the_model_apply_where_a_request_is_silent() -> None:
    llm = StandIn()
    app = app_of(llm, chat_template=TEMPLATE)
    app.state.server.sampling_defaults = {"temperature": 0.6, "top_k": 20, "max_tokens": 9}
    post(app, "/v1/completions", {"prompt": "Hello", "top_k": 3})
    post(app, "/v1/chat/completions", {"messages": CONVERSATION["messages"]})
    assert llm.params == [
        SamplingParams(temperature=0.6, top_k=3, max_tokens=16),
        SamplingParams(temperature=0.6, top_k=20, max_tokens=9),
    ]
