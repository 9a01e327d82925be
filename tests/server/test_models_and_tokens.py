"""`/v1/models`, `/tokenize` and `/detokenize`."""

from typing import Any

import pytest

from tests.server.stand_in import TEMPLATE, TOKENIZER, StandIn, app_of, get, post

LLM = StandIn()
APP = app_of(LLM, chat_template=TEMPLATE)


def test_the_list_of_models() -> None:
    found = get(APP, "/v1/models").json()
    assert found["object"] == "list"
    assert [model["id"] for model in found["data"]] == ["tiny", "other/tiny"]
    created = APP.state.server.created
    assert found["data"][0] == {
        "id": "tiny",
        "object": "model",
        "created": created,
        "owned_by": "hetis",
        "root": "tiny",
        "parent": None,
        "max_model_len": 1024,
    }


def test_one_model() -> None:
    assert get(APP, "/v1/models/other/tiny").json()["id"] == "other/tiny"
    missing = get(APP, "/v1/models/gpt-9")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_the_root_is_the_model_that_was_loaded() -> None:
    app = app_of(StandIn(), served_model_names=())
    model = get(app, "/v1/models").json()["data"][0]
    assert model["id"] == model["root"] == "hetis-small"


TEXT = "Hello, wörld"
IDS = TOKENIZER.encode(TEXT)


def test_a_text_and_back() -> None:
    found = post(APP, "/tokenize", {"prompt": TEXT}).json()
    assert found == {"count": len(IDS), "max_model_len": 1024, "tokens": IDS, "token_strs": None}
    assert post(APP, "/detokenize", {"model": "tiny", "tokens": IDS}).json() == {"prompt": TEXT}
    assert post(APP, "/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert post(APP, "/tokenize", {"prompt": ""}).json()["tokens"] == []


def test_strings_of_tokens() -> None:
    body = {"model": "tiny", "prompt": TEXT, "add_special_tokens": False, "return_token_strs": True}
    assert post(APP, "/tokenize", body).json()["token_strs"] == TOKENIZER.convert_ids_to_tokens(IDS)


def test_a_conversation() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]

    def text(**fields: Any) -> Any:
        found = post(APP, "/tokenize", {"messages": messages} | fields).json()
        return post(APP, "/detokenize", {"tokens": found["tokens"]}).json()["prompt"]

    assert text() == "<user>Hi</user><assistant>Well</assistant><assistant>"
    assert text(add_generation_prompt=False) == "<user>Hi</user><assistant>Well</assistant>"
    assert text(continue_final_message=True) == "<user>Hi</user><assistant>Well"
    assert text(chat_template_kwargs={"shout": True}).endswith("LOUD<assistant>")


def test_a_long_text_is_tokenised_in_a_thread() -> None:
    assert post(APP, "/tokenize", {"prompt": "word " * 5000}).json()["count"] >= 5000
    response = post(APP, "/v1/completions", {"prompt": "word " * 900, "max_tokens": 2})
    assert response.status_code == 200
    assert response.json()["usage"]["prompt_tokens"] > 900


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "thief", "content": ""}]}, "messages"),
        ("/tokenize", {"messages": [], "prompt": "x"}, "prompt"),
        ("/tokenize", {"prompt": "x", "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "more": 1}, "more"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [3072]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**64]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [1.0]}, "tokens"),
        ("/detokenize", {"tokens": ["1"]}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(path: str, body: Any, field: str) -> None:
    response = post(APP, path, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_another_model(path: str) -> None:
    response = post(
        APP, path, {"model": "gpt-9", "prompt": "x"} if path == "/tokenize" else {"model": "g", "tokens": []}
    )
    assert response.status_code == 404


def test_a_model_without_a_tokenizer() -> None:
    llm = StandIn(tokenizer_is_missing=True)
    app = app_of(llm)
    assert post(app, "/tokenize", {"prompt": "x"}).json()["error"]["param"] == "model"
    refused = post(app, "/v1/completions", {"prompt": "x"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"
    done = post(app, "/v1/completions", {"prompt": [1, 2], "max_tokens": 2, "return_token_ids": True, "logprobs": 0})
    assert len(done.json()["choices"][0]["token_ids"]) == 2
    assert post(app, "/v1/chat/completions", {"messages": []}).json()["error"]["param"] == "messages"


def test_a_model_without_a_chat_template() -> None:
    error = post(app_of(StandIn()), "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert error.status_code == 400
    assert error.json()["error"]["message"].startswith("the model has no chat template")
