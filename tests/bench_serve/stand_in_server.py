"""A server of OpenAI's interface without a model: tokens come at fixed times, and faults when a request asks for them.

    python tests/bench_serve/stand_in_server.py --port 8000 --ttft-ms 50 --itl-ms 10

Token number i of a request is sent `ttft + i * itl` seconds after its arrival, whatever the load. Its tokenizer takes
bytes as tokens. The field "fault" of a request, {"kind": "...", "every": 1, "after": 2}, spoils every such request:

    status        refuse with "code"              disconnect  cut the connection after `after` tokens
    error         an error event in the stream    garbage     an event that is no JSON
    empty         a stream without choices        no-usage    a stream without usage
    role          a first chunk without text      unframed    a body that ends with the connection, without [DONE]
    not-http      a response that is not HTTP     silent      no response
"""

import argparse
import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 503: "Service Unavailable"}


class RefusedError(Exception):
    """Ends a request with a status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class StandIn:
    """The server. Times in seconds; `unready`: requests for /v1/models that are refused with 503 first."""

    ttft: float = 0.0
    itl: float = 0.0
    model: str = "stand-in"
    root: str | None = None
    max_model_len: int | None = 4096
    vocab_size: int = 20_000
    key: str | None = None
    has_tokenizer: bool = True
    is_llama_cpp: bool = False
    takes_token_ids: bool = True
    unready: int = 0
    unlisted: bool = False
    seen: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)  # path, headers, body
    address: str = ""  # set by `serving`
    num_running: int = 0
    most_running: int = 0
    _faulty: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves the requests of a connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                text = await reader.readexactly(int(headers.get("content-length", 0)))
                body = json.loads(text) if text else None
                self.seen.append((path, headers, body))
                try:
                    await self._answer(writer, method, path, headers, body)
                except RefusedError as refusal:
                    error = {"error": {"message": str(refusal), "type": "invalid_request_error", "code": None}}
                    send_json(writer, error, refusal.status)
                await writer.drain()
        writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, method: str, path: str, headers: dict[str, str], body: Any
    ) -> None:
        if path == "/health":
            return send_json(writer, {})
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            raise RefusedError(401, "wrong key")
        if path == "/v1/models" and not self.unlisted:
            return send_json(writer, self._models())
        if path in ("/tokenize", "/detokenize") and self.has_tokenizer:
            return send_json(writer, self._tokenizer(path, body))
        if method == "POST" and path in ("/v1/completions", "/v1/chat/completions"):
            return await self._generate(writer, path.startswith("/v1/chat"), body)
        raise RefusedError(404, f"no route {path}")

    def _models(self) -> dict[str, Any]:
        if self.unready > 0:
            self.unready -= 1
            raise RefusedError(503, "loading")
        model = {"id": self.model, "object": "model", "root": self.root, "max_model_len": self.max_model_len}
        return {"object": "list", "data": [model]}

    def _tokenizer(self, path: str, body: Any) -> dict[str, Any]:
        text_key = "content" if self.is_llama_cpp else "prompt"
        if path == "/tokenize":
            return {"tokens": list(body.get(text_key, "").encode())}
        return {text_key: bytes(body["tokens"]).decode(errors="replace")}

    async def _generate(self, writer: asyncio.StreamWriter, is_chat: bool, body: Any) -> None:
        arrival = asyncio.get_running_loop().time()
        num_prompt = self._check(is_chat, body)
        fault = self._fault(body)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            response = Response(writer, is_chat, self.model, num_prompt, fault)
            num_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 16
            await response.run(arrival, self.ttft, self.itl, num_tokens, bool(body.get("stream")))
        finally:
            self.num_running -= 1

    def _check(self, is_chat: bool, body: Any) -> int:
        """The length of the prompt of a valid request."""
        if body.get("model") not in (None, self.model):
            raise RefusedError(404, f"no model {body['model']!r}")
        prompt = "".join(str(message["content"]) for message in body["messages"]) if is_chat else body["prompt"]
        if isinstance(prompt, list):
            if not self.takes_token_ids:
                raise RefusedError(400, "prompt must be text")
            if max(prompt) >= self.vocab_size:
                raise RefusedError(400, f"token id {max(prompt)} is out of vocabulary")
            return len(prompt)
        return len(prompt.encode())

    def _fault(self, body: Any) -> dict[str, Any]:
        fault = body.get("fault") or {}
        self._faulty += bool(fault)
        return fault if fault and self._faulty % fault.get("every", 1) == 0 else {}


def send_json(writer: asyncio.StreamWriter, value: Any, status: int = 200) -> None:
    """Sends a whole response."""
    data = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)


class Response:
    """The response to one completion or chat completion."""

    def __init__(
        self, writer: asyncio.StreamWriter, is_chat: bool, model: str, num_prompt: int, fault: dict[str, Any]
    ) -> None:
        self._writer, self._is_chat, self._num_prompt, self._fault = writer, is_chat, num_prompt, fault
        self._kind, self._after = fault.get("kind"), fault.get("after", 0)
        name = "chat.completion.chunk" if is_chat else "text_completion"
        self._common = {"id": "stand-in-1", "object": name, "created": 1_700_000_000, "model": model}

    async def run(self, arrival: float, ttft: float, itl: float, num_tokens: int, is_stream: bool) -> None:
        """Sends the tokens at their times, all at once without `is_stream`."""
        if self._kind == "status":
            raise RefusedError(self._fault["code"], "as asked")
        if self._kind == "not-http":
            self._writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
            return
        if self._kind == "silent":
            await asyncio.Event().wait()
        loop = asyncio.get_running_loop()
        if not is_stream:
            await asyncio.sleep(arrival + ttft + itl * (num_tokens - 1) - loop.time())
            choice = self._choice(" a" * num_tokens, "length", "message")
            send_json(self._writer, self._common | {"choices": [choice], "usage": self._usage(num_tokens)})
            return
        self._head()
        for number in range(num_tokens if self._kind != "empty" else 0):
            if (wait := arrival + ttft + itl * number - loop.time()) > 0:
                await asyncio.sleep(wait)
            if number == self._after and self._spoil():
                return
            self._event({"choices": [self._choice(" a", "length" if number == num_tokens - 1 else None, "delta")]})
        self._end(num_tokens)

    def _choice(self, text: str, reason: str | None, key: str) -> dict[str, Any]:
        content = {key: {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        return {"index": 0, "logprobs": None, "finish_reason": reason, **content}

    def _usage(self, num_tokens: int) -> dict[str, int]:
        total = self._num_prompt + num_tokens
        return {"prompt_tokens": self._num_prompt, "completion_tokens": num_tokens, "total_tokens": total}

    def _head(self) -> None:
        framing = "connection: close" if self._kind == "unframed" else "transfer-encoding: chunked"
        self._writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{framing}\r\n\r\n".encode())

    def _event(self, value: dict[str, Any]) -> None:
        self._send(f"data: {json.dumps(self._common | value)}\n\n")

    def _send(self, text: str) -> None:
        data = text.encode()
        if self._kind != "unframed":
            data = f"{len(data):x}\r\n".encode() + data + b"\r\n"
        self._writer.write(data)

    def _spoil(self) -> bool:
        """Commits the fault; returns whether the response ends with it."""
        if self._kind == "disconnect":
            self._writer.transport.abort()
        elif self._kind == "unframed":
            self._writer.close()
        elif self._kind == "error":
            self._send('data: {"error": {"message": "the engine died", "code": 500}}\n\n')
            self._send("data: [DONE]\n\n")
            self._writer.write(b"0\r\n\r\n")
            return True
        elif self._kind == "garbage":
            self._send("data: {not json\n\n")
        elif self._kind == "role":
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
        return self._kind in ("disconnect", "unframed")

    def _end(self, num_tokens: int) -> None:
        if self._kind not in ("no-usage", "empty"):
            self._event({"choices": [], "usage": self._usage(num_tokens)})
        self._send("data: [DONE]\n\n")
        self._writer.write(b"0\r\n\r\n")


@contextmanager
def serving(stand_in: StandIn) -> Iterator[None]:
    """Serves from a thread while the block runs, at `stand_in.address`."""
    loop, started = asyncio.new_event_loop(), threading.Event()

    def run() -> None:
        server = loop.run_until_complete(asyncio.start_server(stand_in.serve, "127.0.0.1", 0, limit=1 << 24))
        stand_in.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def main() -> None:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(description="OpenAI's interface with fixed delays, without a model.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    options = parser.parse_args()
    stand_in = StandIn(ttft=options.ttft_ms / 1000, itl=options.itl_ms / 1000)

    async def serve() -> None:
        server = await asyncio.start_server(stand_in.serve, "127.0.0.1", options.port, backlog=4096, limit=1 << 24)
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    main()
