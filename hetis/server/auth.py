"""API keys: every route but those of `OPEN_PATHS` needs one, also routes that do not exist."""

import base64
import binascii
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from hetis.server.errors import ApiError, error_response
from hetis.server.options import digest
from hetis.server.paths import header_of, route_path

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/ping"})  # for probes, which have no keys
# browsers then ask for a name and a password: the key is the password
_BASIC = 'Basic realm="hetis: the password is an API key", charset="UTF-8"'


class Authentication:
    """ASGI middleware that answers 401 to requests without one of the keys.

    A key comes as `Authorization: Bearer KEY`, or as the password of basic authentication, which lets browsers show
    the pages. A browser never adds the latter to another site's request with JSON, unless CORS allows that site.
    """

    def __init__(self, app: ASGIApp, digests: Sequence[bytes]) -> None:
        self._app, self._digests = app, tuple(digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or route_path(scope) in OPEN_PATHS or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await error_response(_refusal(scope))(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        key = _key_of(header_of(scope, b"authorization"))
        return is_known(digest(key), self._digests) if key is not None else False


def is_known(candidate: bytes, digests: Sequence[bytes]) -> bool:
    """Whether `candidate` is among the digests, in a time that depends on neither: every digest is compared."""
    found = False
    for known in digests:
        found |= hmac.compare_digest(candidate, known)
    return found


def _key_of(header: str | None) -> str | None:
    scheme, _, value = (header or "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def _refusal(scope: Scope) -> ApiError:
    is_browser = "text/html" in (header_of(scope, b"accept") or "")
    return ApiError(
        401,
        "this server needs an API key; send it in the header `Authorization: Bearer KEY`.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": _BASIC if is_browser else "Bearer"},
    )
