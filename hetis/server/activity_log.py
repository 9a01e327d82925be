"""One log line about what the server does, every ten seconds in which it does something."""

import asyncio
import logging
import time
from collections.abc import Callable

from hetis.core.messages import EngineStatus
from hetis.server.metrics import Metrics

PERIOD_SECONDS = 10.0

_log = logging.getLogger("hetis")


class ActivityLog:
    """Sequences, tokens per second since the last line, and KV pages; nothing while no request comes."""

    def __init__(
        self,
        metrics: Metrics,
        status: Callable[[], EngineStatus | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`status`: the engine's latest one, None before it has said anything."""
        self._metrics, self._status, self._clock = metrics, status, clock
        self._last = self._counts()

    async def run(self) -> None:
        """Reports until it is cancelled."""
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            self.report()

    def report(self) -> None:
        """Logs what has happened since the last call, if anything has, or runs or waits now."""
        then, now = self._last, self._counts()
        self._last = now
        prompt_rate, output_rate = (
            (new - old) / (now[0] - then[0]) for new, old in zip(now[1:], then[1:], strict=True)
        )
        status = self._status()
        if status is None or not (prompt_rate or output_rate or status.num_running or status.num_waiting):
            return
        fields = {
            "num_running": status.num_running,
            "num_waiting": status.num_waiting,
            "prompt_tokens_per_second": round(prompt_rate, 1),
            "output_tokens_per_second": round(output_rate, 1),
            "kv_usage": round(status.kv_usage, 3),
        }
        _log.info(
            "%d running, %d waiting; %.1f tokens/s of prompts, %.1f of outputs; %.0f %% of KV pages in use",
            status.num_running,
            status.num_waiting,
            prompt_rate,
            output_rate,
            100 * status.kv_usage,
            extra={"fields": fields},
        )

    def _counts(self) -> tuple[float, int, int]:
        """Time in seconds, and tokens of prompts and of outputs so far."""
        return self._clock(), self._metrics.prompt_tokens, self._metrics.output_tokens
