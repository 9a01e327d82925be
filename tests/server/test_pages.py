"""The pages as files: their headers, and that they need nothing but this server."""

import re

import httpx
import pytest
from fastapi import FastAPI

from hetis.server import pages

PATHS = ("/", "/fleet", "/pages/style.css", "/pages/chat.js", "/pages/fleet.js")


async def fetch(path: str, has_chat_template: bool = True) -> httpx.Response:
    app = FastAPI()
    app.include_router(pages.make_router(has_chat_template=has_chat_template))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pages") as client:
        return await client.get(path)


def get(path: str, has_chat_template: bool = True) -> httpx.Response:
    import asyncio

    return asyncio.run(fetch(path, has_chat_template))


@pytest.mark.parametrize("path", PATHS)
def test_files_come_with_a_policy_that_allows_this_server_only(path: str) -> None:
    found = get(path)
    assert found.status_code == 200
    assert found.headers["Content-Security-Policy"].startswith("default-src 'self';")
    assert found.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", PATHS)
def test_no_outside_resource_is_named(path: str) -> None:
    text = get(path).text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))


@pytest.mark.parametrize("path", ["/", "/fleet"])
def test_pages_name_only_relative_paths_that_exist(path: str) -> None:
    text = get(path).text
    named = re.findall(r'(?:href|src)="([^"]*)"', text)
    assert named
    for name in named:
        if not name.startswith("data:"):
            assert not name.startswith("/")
            assert get(f"/{name.removeprefix('./')}").status_code == 200


def test_there_is_no_inline_script_or_style() -> None:
    for path in ("/", "/fleet"):
        assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son[a-z]+=", get(path).text)


@pytest.mark.parametrize(("has_template", "answer"), [(True, "yes"), (False, "no")])
def test_the_chat_page_knows_whether_the_model_has_a_chat_template(has_template: bool, answer: str) -> None:
    assert f'data-chat-template="{answer}"' in get("/", has_template).text
