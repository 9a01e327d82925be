"""Metrics of HTTP: requests and their duration, by the template of their route, so that no client makes labels."""

import asyncio
from collections.abc import Collection
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hetis.server.paths import route_path

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
UNKNOWN = "none"  # the route of paths that the server does not have
CLIENT_GONE = "499"  # the client has gone before the status was sent
FAILED = "500"


class HttpMetrics:
    """ASGI middleware. A request lasts until the last byte of its body; names are those of other servers in Python."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry, known: Collection[str]) -> None:
        """`known`: paths that keep their name where a request is refused before it is routed."""
        self._app, self._known = app, known
        labels = ("handler", "method", "status")
        self._requests = Counter("http_requests_total", "Requests by route and status.", labels, registry=registry)
        self._seconds = Histogram(
            "http_request_duration_seconds", "To the last byte.", labels, registry=registry, buckets=BUCKETS
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = monotonic(), ""

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, note)
        except asyncio.CancelledError:
            status = status or CLIENT_GONE
            raise
        except BaseException:
            status = status or FAILED
            raise
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            labels = self._route_of(scope), method, status or CLIENT_GONE
            self._requests.labels(*labels).inc()
            self._seconds.labels(*labels).observe(monotonic() - begin)

    def _route_of(self, scope: Scope) -> str:
        """The template of the route, like "/v1/models/{name}"."""
        route = scope.get("route")
        if route is not None:
            return str(route.path)
        path = route_path(scope)
        return path if path in self._known else UNKNOWN
