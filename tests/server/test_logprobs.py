"""Log-probabilities in the forms of completions and of chat, and echoed prompts as lm-eval reads them."""

from typing import Any

from tests.server.stand_in import TEMPLATE, TOKENIZER, StandIn, app_of, post

LLM = StandIn()
APP = app_of(LLM, chat_template=TEMPLATE)
CONVERSATION = [{"role": "user", "content": "Hi"}]


def choices(path: str, **body: Any) -> list[Any]:
    response = post(APP, path, body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]  # type: ignore[no-any-return]


def decoded(token: int) -> str:
    return str(TOKENIZER.decode([token]))


def test_the_form_of_completions() -> None:
    ids = [40, 3, 5]
    choice = choices("/v1/completions", prompt=ids, max_tokens=4, logprobs=2, return_token_ids=True)[0]
    found, tokens = choice["logprobs"], choice["token_ids"]
    assert list(found) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
    assert found["tokens"] == [decoded(token) for token in tokens]
    assert found["text_offset"] == [sum(map(len, found["tokens"][:index])) for index in range(4)]
    for token, own, best in zip(tokens, found["token_logprobs"], found["top_logprobs"], strict=True):
        assert own == (-0.5 if token % 2 == 0 else -9.25)
        assert best[decoded(token)] == own, "the token itself is always there"
        assert len(best) in (2, 3)


def test_zero_means_the_token_alone() -> None:
    found = choices("/v1/completions", prompt="a", max_tokens=3, logprobs=0)[0]["logprobs"]
    assert [list(best) for best in found["top_logprobs"]] == [[token] for token in found["tokens"]]


def test_an_echoed_prompt_is_scored() -> None:
    """The request of lm-eval's loglikelihood: batched token ids, one token, greedy."""
    prompts = [[40, 3, 5, 8], [9, 11]]
    body = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    found = choices("/v1/completions", prompt=prompts, **body)
    for prompt, choice in zip(prompts, found, strict=True):
        scored = choice["logprobs"]
        assert scored["tokens"][: len(prompt)] == [decoded(token) for token in prompt]
        assert scored["token_logprobs"][0] is None
        assert scored["top_logprobs"][0] is None
        expected = [-0.5 if token % 2 == 0 else -9.25 for token in prompt[1:]]
        assert scored["token_logprobs"][1:-1] == expected
        assert choice["text"].startswith(TOKENIZER.decode(prompt))
        assert all(len(values) == len(prompt) + 1 for values in scored.values())


def test_a_prompt_alone() -> None:
    choice = choices("/v1/completions", prompt="Hello", max_tokens=0, echo=True, logprobs=1)[0]
    assert choice["text"] == "Hello"
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(TOKENIZER.encode("Hello"))
    response = post(APP, "/v1/completions", {"prompt": "Hello", "max_tokens": 0, "echo": True}).json()
    assert response["usage"]["completion_tokens"] == 0
    assert response["choices"][0]["logprobs"] is None


def test_scores_of_a_prompt() -> None:
    body = {"max_tokens": 1, "prompt_logprobs": 1}
    scored = choices("/v1/completions", prompt=[40, 3, 6], **body)[0]["prompt_logprobs"]
    assert scored[0] is None
    assert scored[1]["3"] == {"logprob": -9.25, "rank": 50, "decoded_token": decoded(3)}
    assert list(scored[2]) == ["6"]
    chat = post(APP, "/v1/chat/completions", {"messages": CONVERSATION, **body}).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in chat["choices"][0]


def test_the_form_of_chat() -> None:
    body = {"messages": CONVERSATION, "max_tokens": 8, "logprobs": True, "return_token_ids": True}
    choice = choices("/v1/chat/completions", top_logprobs=2, **body)[0]
    for token, entry in zip(choice["token_ids"], choice["logprobs"]["content"], strict=True):
        assert entry["token"] == decoded(token)
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert [best["logprob"] for best in entry["top_logprobs"]] == [-0.5, -1.0], "the best ones, by rank"
        assert (entry["token"] in {best["token"] for best in entry["top_logprobs"]}) == (token % 2 == 0)
    without = choices("/v1/chat/completions", **body)[0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in without] == [[]] * 8
    assert [entry["logprob"] for entry in without] == [entry["logprob"] for entry in choice["logprobs"]["content"]]


def test_bytes_of_tokens_within_a_character() -> None:
    ids = TOKENIZER.encode("❤")
    assert len(ids) == 3, "one token for each byte"
    LLM.fixed_tokens = ids
    try:
        body = {"messages": CONVERSATION, "max_tokens": 3, "logprobs": True}
        choice = choices("/v1/chat/completions", **body)[0]
    finally:
        LLM.fixed_tokens = []
    assert choice["message"]["content"] == "❤"
    assert bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"]).decode() == "❤"


def test_tokens_as_ids() -> None:
    body = {"max_tokens": 2, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = choices("/v1/completions", prompt=[7], logprobs=1, echo=True, **body)[0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in (7, *choice["token_ids"])]
    chat = choices("/v1/chat/completions", messages=CONVERSATION, logprobs=True, top_logprobs=1, **body)[0]
    assert [entry["token"] for entry in chat["logprobs"]["content"]] == [f"token_id:{t}" for t in chat["token_ids"]]
