"""One run: requests sent when they are due, whatever the server does, and the lag of this client meanwhile."""

import asyncio
import gc
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from hetis.bench_serve.answer import Answer
from hetis.bench_serve.errors import RequestError
from hetis.bench_serve.http_client import HttpClient

TICK_SECONDS = 0.01  # between two samples of the event loop's delay


class Prepared(NamedTuple):
    """A request encoded before the run. `prompt_len` in tokens; `due` in seconds from the start of the run."""

    data: bytes
    prompt_len: int
    due: float


class Outcome(NamedTuple):
    """Answers in the order in which they were due; times of `answers` count from the start of the run.

    `duration`: seconds until the last response ended. `delays`: how late the event loop served its timer, in seconds.
    """

    answers: list[Answer]
    duration: float
    delays: list[float]


class DelaySampler:
    """Samples how late the event loop is: as late, stamps and requests of this client may be."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self._arm()

    def stop(self) -> None:
        """Ends sampling."""
        self._timer.cancel()

    def _arm(self) -> None:
        self._due = time.perf_counter() + TICK_SECONDS
        self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self.delays.append(max(0.0, time.perf_counter() - self._due))
        self._arm()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps the garbage collector from stopping the event loop: a full collection takes tens of milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def allow_many_connections() -> None:
    """Raises this process's soft limit of open files, one per connection, to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class LoadGenerator:
    """Sends prepared requests at their times.

    Requests are never held back by slow responses, except by `max_concurrency`, and how long each of them waited is
    part of its answer: a server that stalls cannot hide it by slowing down the client (coordinated omission).
    """

    def __init__(
        self,
        client: HttpClient,
        *,
        max_concurrency: int | None = None,
        time_limit: float | None = None,
        timeout: float,
        on_done: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        """`timeout`: seconds for one request. `time_limit`: seconds after which no request is due or leaves the queue.

        `on_done` is called with each answer.
        """
        self._client, self._timeout, self._on_done = client, timeout, on_done
        self._time_limit = float("inf") if time_limit is None else time_limit
        self._gate = None if max_concurrency is None else asyncio.Semaphore(max_concurrency)
        self._start = 0.0

    async def run(self, requests: Sequence[Prepared]) -> Outcome:
        """Sends all requests and waits for their ends."""
        with _undisturbed():
            sampler = DelaySampler()
            self._start = time.perf_counter()
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = await self._send_all(group, requests)
            finally:
                sampler.stop()
            duration = time.perf_counter() - self._start
        answers = [answer for task in tasks if (answer := task.result()) is not None]
        for answer in answers:
            answer.count_from(self._start)
        return Outcome(answers, duration, sampler.delays)

    async def _send_all(
        self, group: asyncio.TaskGroup, requests: Sequence[Prepared]
    ) -> list["asyncio.Task[Answer | None]"]:
        tasks = []
        for request in requests:
            if request.due > self._time_limit + 1e-6:  # the last due time of a rate and duration is rounded
                break
            # again, because a loop may wake up a little early: its clock and this one differ
            while (wait := self._start + request.due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(self._send(request)))
        return tasks

    async def _send(self, request: Prepared) -> Answer | None:
        """The answer to one request; None if the time was up while it waited for others to end."""
        answer = Answer(request.prompt_len, self._start + request.due)
        must_wait = self._gate is not None and self._gate.locked()
        async with self._gate or nullcontext():
            answer.start = time.perf_counter()
            if must_wait and answer.start - self._start > self._time_limit:
                return None
            try:
                is_whole = await self._client.exchange(request.data, answer, self._timeout)
                answer.finish(is_whole)
            except RequestError as error:
                answer.fail(error)
                answer.finish()
        self._on_done(answer)
        return answer
