"""Which requests may enter: none before the fleet is up or while the server ends, and no more than the queue holds."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from hetis.core.messages import EngineStatus
from hetis.server.errors import ApiError, error_response
from hetis.server.paths import route_path

QUEUE_FACTOR = 4  # sequences that may wait, per sequence that may run
State = Literal["starting", "ready", "draining", "dead"]

# state: (why a request is refused, seconds after which a client may try again)
_REFUSALS = {
    "starting": ("the model is being loaded; try again later.", 5),
    "draining": ("the server is shutting down; send the request to another one, or try again later.", 10),
    "dead": ("the engine has ended; the server is shutting down.", 10),
}
_RETRY_WHEN_FULL = 1


class Admission:
    """Counts sequences from admission to their last token, and refuses what does not fit into the queue.

    The engine runs up to `max_num_seqs` sequences, fewer if KV memory is short. How many run is known from its latest
    status, a fraction of a second old; what was admitted and does not run waits.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_queued: int | None,
        state: Callable[[], State],
        status: Callable[[], EngineStatus | None],
    ) -> None:
        """`max_queued`: sequences that may wait; None: `QUEUE_FACTOR` times `max_num_seqs`."""
        self.max_queued = QUEUE_FACTOR * max_num_seqs if max_queued is None else max_queued
        self._max_num_seqs, self._state, self._status = max_num_seqs, state, status
        self.num_sequences = 0  # admitted and unfinished

    @contextmanager
    def admit(self, num_sequences: int) -> Iterator[None]:
        """The time that a request with `num_sequences` completions is in the engine.

        Raises ApiError: 503 while there is no room, 400 if there never will be.
        """
        if num_sequences > self._max_num_seqs + self.max_queued:
            raise ApiError(
                400,
                f"the request asks for {num_sequences} sequences (prompts times n), but this server holds at most "
                f"{self._max_num_seqs + self.max_queued} at once.",
                param="n",
            )
        self.check(num_sequences)
        self.num_sequences += num_sequences
        try:
            yield
        finally:
            self.num_sequences -= num_sequences

    def check(self, num_sequences: int) -> None:
        """Raises ApiError 503 unless the server is ready and has room for so many sequences more."""
        state = self._state()
        if state != "ready":
            raise _refusal(*_REFUSALS[state])
        if not self.has_room(num_sequences):
            raise _refusal("the queue is full; try again later.", _RETRY_WHEN_FULL)

    def has_room(self, num_sequences: int = 1) -> bool:
        """Whether so many sequences more run at once or fit into the queue."""
        return self.num_sequences + num_sequences <= self._capacity() + self.max_queued

    @property
    def num_waiting(self) -> int:
        """Sequences that were admitted and do not run."""
        return max(0, self.num_sequences - self._capacity())

    def _capacity(self) -> int:
        """Sequences that can run at once: as many as do, if others wait for them."""
        status = self._status()
        return status.num_running if status is not None and status.num_waiting else self._max_num_seqs


def _refusal(message: str, retry_after: int) -> ApiError:
    return ApiError(503, message, code="service_unavailable", headers={"Retry-After": str(retry_after)})


class Gate:
    """ASGI middleware that refuses requests for the model before their body is read, while the server cannot take them.

    Under too much load most requests are refused, so this must cost little: 0.14 ms of CPU on a kept connection; with
    the body read and checked first it was 0.39. What needs no model stays: health, metrics, pages, and while the server
    drains also the list of models.
    """

    def __init__(
        self, app: ASGIApp, admission: Admission, state: Callable[[], State], generating: Collection[str]
    ) -> None:
        """`generating`: paths whose requests need room for a sequence, at least."""
        self._app, self._admission, self._state, self._generating = app, admission, state, generating

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._needs_model(scope):
            try:
                self._admission.check(num_sequences=int(route_path(scope) in self._generating))
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _needs_model(self, scope: Scope) -> bool:
        path = route_path(scope)
        if scope["method"] == "POST":
            return path != "/ping"
        return path.startswith("/v1/") and self._state() == "starting"
