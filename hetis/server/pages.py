"""The pages for browsers: `/`, to try the model at once, and `/fleet`, which shows the devices at work.

They are files of the package, use no outside resources, and need no build step. A Content-Security-Policy allows
nothing that does not come from this server. All paths in them are relative, so that they work behind `--root-path`.
"""

from pathlib import Path

from fastapi import APIRouter, Response

DIRECTORY = Path(__file__).parent.parent / "assets" / "pages"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # another version of hetis may be next on this port
}
_TYPES = {".css": "text/css", ".js": "text/javascript"}


def make_router(*, has_chat_template: bool) -> APIRouter:
    """Routes of both pages and their files. `has_chat_template`: else the chat page continues text."""
    answer = "yes" if has_chat_template else "no"
    chat = _read("chat.html").replace('class="chat"', f'class="chat" data-chat-template="{answer}"')
    router = APIRouter(include_in_schema=False)
    _add(router, "/", chat, "text/html")
    _add(router, "/fleet", _read("fleet.html"), "text/html")
    for name in ("style.css", "chat.js", "fleet.js"):
        _add(router, f"/pages/{name}", _read(name), _TYPES[Path(name).suffix])
    return router


def _read(name: str) -> str:
    return (DIRECTORY / name).read_text(encoding="utf-8")


def _add(router: APIRouter, path: str, content: str, media_type: str) -> None:
    router.add_api_route(path, lambda: Response(content, media_type=media_type, headers=HEADERS), methods=["GET"])
