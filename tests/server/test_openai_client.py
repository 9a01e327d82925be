"""Every field of a request through OpenAI's own client: it is taken, or the exception has the status and the field.

The client checks and converts on its way; what it has no parameter for goes into `extra_body`, as its users do it.
"""

import asyncio
import inspect
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import openai
import pytest

from tests.server import test_parameters as tables
from tests.server.stand_in import TEMPLATE, StandIn, app_of, openai_client

TAKEN = {"completions": tables.OF_COMPLETIONS, "chat": tables.OF_CHAT}
REFUSED = {"completions": tables.WRONG_IN_COMPLETIONS, "chat": tables.WRONG_IN_CHAT}
T = TypeVar("T")


class Client:
    """One client and one server for all calls."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner, self.llm = runner, StandIn()
        self._client = openai_client(app_of(self.llm, chat_template=TEMPLATE))
        self._creates = {"completions": self._client.completions.create, "chat": self._client.chat.completions.create}

    def ask(self, endpoint: str, **fields: Any) -> Any:
        create: Any = self._creates[endpoint]
        known = inspect.signature(create).parameters
        body = {"model": "tiny"} | tables.PATHS[endpoint][1] | fields
        own = {name: value for name, value in body.items() if name in known}
        rest = {name: value for name, value in body.items() if name not in known}
        return self.run(create(**own, extra_body=rest))

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(call)

    def close(self) -> None:
        self.run(self._client.close())


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with asyncio.Runner() as runner:
        found = Client(runner)
        yield found
        found.close()


@tables.BOTH
def test_fields_that_are_taken(client: Client, endpoint: str) -> None:
    for field, value, expected in tables.ACCEPTED + TAKEN[endpoint]:
        client.llm.params.clear()
        answer = client.ask(endpoint, **{field: value})
        assert answer.choices[0].finish_reason in ("stop", "length"), (field, value)
        found = client.llm.params[-1]
        assert {name: getattr(found, name) for name in expected} == expected, (field, value)


@tables.BOTH
def test_fields_that_are_refused(client: Client, endpoint: str) -> None:
    for field, value in tables.WRONG + REFUSED[endpoint]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.ask(endpoint, **{field: value})
        error = caught.value
        assert (error.status_code, error.param, error.type) == (400, field, "invalid_request_error"), (field, value)
        assert field in error.message, (field, value)


@tables.BOTH
def test_fields_that_are_not_supported(client: Client, endpoint: str) -> None:
    for field, (harmless, _) in tables.TABLES[endpoint].items():
        for value in harmless:
            assert client.ask(endpoint, **{field: value}).choices, (field, value)
        with pytest.raises(openai.BadRequestError) as caught:
            client.ask(endpoint, **{field: ["something"]})
        assert caught.value.param == field


def test_a_model_that_is_not_there(client: Client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.ask("chat", model="gpt-9")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
