"""One real server, as its clients, the network and its log see it."""

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from tests.launch.fleet_process import ROOT
from tests.processes.look import DEADLINE, family
from tests.server.server_process import SMALL, ServerProcess

KEY, PROMPT = "the-key", "A secret list is"
OPEN = {"/livez", "/readyz", "/health", "/ping"}  # documented in docs/serving.md
INTERNAL = re.compile(r"/work|/home|/tmp|/root|site-packages|\.py\b|0x[0-9a-f]{6}|Traceback")


class Served(NamedTuple):
    process: ServerProcess
    url: str
    client: httpx.Client  # with the key


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="t") as name:
        keys = Path(name) / "keys"
        keys.write_text(f"{KEY}\n")
        options = ["--api-key-file", str(keys), "--log-format", "json", "--served-model-name", "tiny", "--plan", "1+1"]
        folder = Path(name) / "run"
        folder.mkdir()
        with ServerProcess(folder, *options) as process:
            url = process.wait_until_ready()
            headers = {"Authorization": f"Bearer {KEY}"}
            with httpx.Client(base_url=url, headers=headers, timeout=DEADLINE, trust_env=False) as client:
                yield Served(process, url, client)


def messages(process: ServerProcess) -> list[dict[str, Any]]:
    """Log lines of all processes, all of which are JSON objects."""
    return [json.loads(line) for line in [*process.err]]


def test_the_log_says_where_what_and_how_to_try_it(served: Served) -> None:
    [ready] = [line["message"] for line in messages(served.process) if line["message"].startswith("ready on")]
    for word in (f"ready on {served.url} (reachable from this machine only", "model tiny, plan 1+1, API key on. Try: "):
        assert word in ready
    command = ready.partition("Try: ")[2]
    result = subprocess.run(
        ["sh", "-c", command], env={"HETIS_API_KEY": KEY}, capture_output=True, text=True, check=True
    )
    found = json.loads(result.stdout)
    assert (found["model"], found["usage"]["completion_tokens"]) == ("tiny", 32)


def test_every_route_of_the_schema_needs_the_key(served: Served) -> None:
    paths = served.client.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/livez"} <= paths.keys()
    with httpx.Client(base_url=served.url, timeout=DEADLINE, trust_env=False) as stranger:
        for path in [*paths, "/", "/fleet", "/metrics", "/docs", "/no/such/route"]:
            for method in ("GET", "POST"):
                assert (stranger.request(method, path).status_code == 401) == (path not in OPEN), path


def test_answers_have_no_internals_and_no_cors(served: Served) -> None:
    bodies: list[Any] = [
        b"{",
        b"[" * 10_000,
        b'{"prompt": 1e999}',
        b'{"n": "x"}',
        b'{"prompt": "\\ud800"}',
        b"\xff",
        b"",
    ]
    headers = {"Content-Type": "application/json", "Origin": "https://evil.example"}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/nothing"):
        for body in bodies:
            found = served.client.post(path, content=body, headers=headers)
            assert 400 <= found.status_code < 500, (path, body)
            assert not INTERNAL.search(found.text), found.text
            assert found.json()["error"]["message"]
            assert not any(name.startswith("access-control") for name in found.headers)
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    found = served.client.options("/v1/completions", headers=preflight)
    assert not any(name.startswith("access-control") for name in found.headers)


def test_the_id_of_a_request_is_echoed_and_logged_with_its_tokens_and_without_its_text(served: Served) -> None:
    body = {"prompt": PROMPT, "max_tokens": 7, "temperature": 0, "ignore_eos": True}
    found = served.client.post("/v1/completions", json=body, headers={"X-Request-Id": "my-id"})
    assert found.headers["x-request-id"] == "my-id"
    text = found.json()["choices"][0]["text"]
    served.process.logged('"my-id"')
    [line] = [line for line in messages(served.process) if line.get("request_id") == "my-id"]
    expected = {"route": "/v1/completions", "status": 200, "output_tokens": 7, "reason": "length", "level": "info"}
    assert {name: line[name] for name in expected} == expected
    assert line["prompt_tokens"] == found.json()["usage"]["prompt_tokens"]
    log = served.process.text()
    assert PROMPT not in log
    assert text not in log
    assert KEY not in "".join(served.process.err)


def test_nothing_but_the_port_listens(served: Served) -> None:
    port = int(served.url.rpartition(":")[2])
    listening = [
        connection.laddr
        for process in family(psutil.Process(served.process.process.pid))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", port)]


def test_no_process_of_the_fleet_has_the_key(served: Served) -> None:
    for process in family(psutil.Process(served.process.process.pid)):
        assert KEY not in " ".join(process.cmdline()), process
        assert KEY not in str(process.environ()), process


def test_a_port_in_use_is_refused_before_a_fleet_starts(served: Served) -> None:
    port = served.url.rpartition(":")[2]
    command = [sys.executable, "-m", "hetis", "serve", *SMALL, "--port", port]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert (result.returncode, result.stdout) == (1, "")
    sentence = f"hetis: port {port} of 127.0.0.1 is in use; give another --port, or end the program that has it.\n"
    assert result.stderr == sentence


def test_requests_of_a_client_that_has_gone_are_aborted(served: Served) -> None:
    """The server has no sequence left, though the one that was cut would run for ever so long."""
    body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with served.client.stream("POST", "/v1/completions", json=body, headers={"X-Request-Id": "cut"}) as answer:
        next(answer.iter_lines())
    served.process.logged('"cut"')
    [line] = [line for line in messages(served.process) if line.get("request_id") == "cut"]
    assert line["output_tokens"] < 900


def test_it_is_healthy_and_a_signal_ends_it(served: Served) -> None:
    for path, status in (("/livez", "alive"), ("/readyz", "ready"), ("/health", "healthy")):
        assert served.client.get(path).json()["status"] == status
    served.process.members()
    served.process.process.send_signal(signal.SIGTERM)
    assert served.process.wait() == 0, served.process.text()
    assert served.process.leftovers() == []
    unusual = [line["message"] for line in messages(served.process) if line["level"] != "info"]
    assert all("compete for" in message for message in unusual), "ranks share the cores of a small machine"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
