"""Errors in OpenAI's shape. What a client reads are sentences of hetis, never texts of libraries."""

import json
import re
from collections.abc import Container, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_MAX_SHOWN = 80  # characters of a client's value in a sentence
_MAX_PARAM = 64
_FIRST_WORD = re.compile(r"\w+")
_TEMPLATES_OWN = "TemplateError"  # of jinja2: what `raise_exception` raises in a template; others are subclasses


class ApiError(Exception):
    """An answer other than 2xx. `message` is one sentence for the client, without internals."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})


def error_body(error: ApiError) -> bytes:
    """The JSON object of an error. ASCII only: what it quotes of a request may hold lone surrogates."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    shown = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return json.dumps({"error": shown}, separators=(",", ":")).encode()


def error_response(error: ApiError) -> Response:
    return Response(error_body(error), error.status, error.headers, "application/json")


def shown(value: object) -> str:
    """Value of a request as part of a sentence: its JSON text on one line, cut to 80 characters."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def wrong_value(field: str, value: object, allowed: str) -> ApiError:
    """400 for a field with a wrong value. `allowed`: what it must be, as in "true or false"."""
    return ApiError(400, f"{shown_name(field)} is {shown(value)}, but must be {allowed}.", shown_name(field))


def shown_name(field: str) -> str:
    """A field's name as the client wrote it, cut, and with escapes for what is no printable ASCII."""
    name = field if field.isascii() and field.isprintable() else json.dumps(field)[1:-1]
    return name if len(name) <= _MAX_PARAM else f"{name[:_MAX_PARAM]}..."


def refused(error: ValueError, fields: Container[str], otherwise: str, hidden: str) -> ApiError:
    """400 from a ValueError of the front end.

    `fields`: names one of which a sentence may begin with; that is the field at fault, else `otherwise` is.
    `hidden`: the sentence when the error stems from a library (it then has a cause), whose text stays in the server;
    what a chat template itself says about a conversation is the model author's sentence, and is passed on.
    """
    cause = error.__cause__
    if cause is None:
        first = _FIRST_WORD.match(str(error))
        return ApiError(400, str(error), first[0] if first and first[0] in fields else otherwise)
    if type(cause).__name__ == _TEMPLATES_OWN:
        return ApiError(400, f"the chat template refuses {otherwise}: {shown(str(cause))}.", otherwise)
    return ApiError(400, hidden, otherwise)


# --- handlers ---------------------------------------------------------------------------------------------------------


def add_error_handlers(app: FastAPI) -> None:
    """Makes `app` answer all errors in OpenAI's shape, also those of routing and those nothing else has caught."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Exception, _on_failure)


async def _on_api_error(request: Request, error: Any) -> Response:
    return error_response(error)


async def _on_http_exception(request: Request, error: Any) -> Response:
    path = shown_name(request.url.path)
    known = {
        404: f"there is no {path} here; /openapi.json lists what there is.",
        405: f"{path} does not take {shown_name(request.method)}; the header Allow names what it takes.",
    }
    message = known.get(error.status_code, "the request cannot be served.")
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _on_invalid(request: Request, error: Any) -> Response:
    """For routes whose parameters FastAPI checks."""
    first = error.errors()[0]
    field = str(first["loc"][-1])
    return error_response(wrong_value(field, first.get("input"), "a value that /openapi.json allows"))


async def _on_failure(request: Request, error: Exception) -> Response:
    return error_response(internal_error())


def internal_error() -> ApiError:
    """500 for a failure that is the server's own; the traceback is in the log."""
    return ApiError(500, "the server failed on this request; the cause is in its log.", code="internal_error")
