"""What several parts of the server read from a request's scope (the ASGI specification)."""

from starlette.types import ASGIApp, Receive, Scope, Send


class Prefix:
    """ASGI middleware that tells the router under which path a proxy serves it, whether or not the proxy cuts it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["root_path"] = self._prefix
        await self._app(scope, receive, send)


def route_path(scope: Scope) -> str:
    """The path by which the router finds a route: without the prefix of the proxy, if the proxy has left it there.

    As in starlette: what is exempt here and what is routed there must be the same.
    """
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    if not prefix or not path.startswith(prefix):
        return path
    rest = path[len(prefix) :]
    return rest if not rest or rest.startswith("/") else path


def header_of(scope: Scope, name: bytes) -> str | None:
    """The first header `name` (in lower case); None if there is none. Bytes beyond ASCII are Latin-1."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return None
