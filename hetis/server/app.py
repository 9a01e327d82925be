"""The ASGI application: routes, and around them what is done for every request."""

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from hetis import __version__
from hetis.server import chat, completions, feed, health, metrics, models, pages, tokenize
from hetis.server.admission import Gate
from hetis.server.auth import Authentication
from hetis.server.context import Server
from hetis.server.errors import add_error_handlers
from hetis.server.http_metrics import HttpMetrics
from hetis.server.limits import BodyLimits, HeaderLimits
from hetis.server.options import ServerOptions
from hetis.server.paths import Prefix
from hetis.server.request_log import RequestLog

if TYPE_CHECKING:
    from hetis.frontend.async_llm import AsyncLLM


def build_app(llm: "AsyncLLM", options: ServerOptions) -> FastAPI:
    """The application for one fleet. FastAPI's own pages are off, since they load scripts from other hosts."""
    app = FastAPI(title="hetis", version=__version__, docs_url=None, redoc_url=None)
    app.state.server = server = Server(llm, options)
    for part in (health, metrics, feed, models, completions, chat, tokenize):
        app.include_router(part.router)
    has_template = options.chat_template is not None or getattr(llm.tokenizer, "chat_template", None) is not None
    app.include_router(pages.make_router(has_chat_template=has_template))
    add_error_handlers(app)
    _wrap(app, server, options)
    return app


def _wrap(app: FastAPI, server: Server, options: ServerOptions) -> None:
    """Adds the middleware, from the innermost to the outermost.

    A request is counted and logged; then come CORS (whose preflight requests have no key), header limits, the key,
    whether the server can take it, and only then the body is read.
    """
    app.add_middleware(BodyLimits, max_bytes=options.max_body_bytes)
    generating = (completions.PATH, chat.PATH)
    app.add_middleware(Gate, admission=server.admission, state=lambda: server.state, generating=generating)
    if options.api_key_digests:
        app.add_middleware(Authentication, digests=options.api_key_digests)
    app.add_middleware(HeaderLimits)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # clients add their own, as OpenAI's for browsers does: X-Stainless-Lang and others
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    app.add_middleware(RequestLog)
    app.add_middleware(HttpMetrics, registry=server.metrics.registry, known=generating)
    if options.root_path:
        app.add_middleware(Prefix, prefix=options.root_path)
