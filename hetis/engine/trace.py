"""What every rank does in every step, as a file for chrome://tracing or ui.perfetto.dev."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hetis.core.fleet import DeviceInfo
from hetis.core.messages import StepTimes
from hetis.core.plan import Plan
from hetis.core.times import Span, StageTimes

FIELDS = 3  # span, begin, end


class TraceFile:
    """A process per rank, a thread per stage; in each step a bar, and below it what the rank was doing.

    The JSON array is closed at the end; viewers also read one that was cut off.
    """

    def __init__(self, path: Path, plan: Plan, fleet: Sequence[DeviceInfo]) -> None:
        """Raises ValueError when the file cannot be written."""
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise ValueError(f"trace file {path} cannot be written ({error.strerror}); name another one.") from error
        self._epoch: float | None = None  # of the first event: small numbers keep their microseconds
        self._separator = b"[\n"
        for info in fleet:
            name = f"rank {info.rank}: {plan.role_of(info.rank)} on {info.device}"
            self._write({"ph": "M", "name": "process_name", "pid": info.rank, "args": {"name": name}})

    def add(self, times: StepTimes) -> None:
        for stage in times.stages:
            self._add_stage(times.rank, times.step, stage)

    def _add_stage(self, rank: int, step: int, times: StageTimes) -> None:
        laps = np.frombuffer(times.trace, dtype=np.float64).reshape(-1, FIELDS).tolist()
        if not laps:
            return
        self._epoch = laps[0][1] if self._epoch is None else self._epoch
        told = {"heads": times.heads, "prompt_tokens": times.num_prompt_tokens, "page_layers": times.num_page_layers}
        self._bar(rank, times.stage, f"step {step}", laps[0][1], laps[-1][2], told)
        for span, begin, end in laps:
            self._bar(rank, times.stage, Span(int(span)).label, begin, end)

    def _bar(
        self, rank: int, stage: int, name: str, begin: float, end: float, told: dict[str, int] | None = None
    ) -> None:
        assert self._epoch is not None
        start_us, duration_us = round(1e6 * (begin - self._epoch), 3), round(1e6 * (end - begin), 3)
        event = {"ph": "X", "name": name, "pid": rank, "tid": stage, "ts": start_us, "dur": duration_us}
        self._write(event if told is None else event | {"args": told})

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(self._separator + msgspec.json.encode(event))
        self._separator = b",\n"

    def close(self) -> None:
        self._file.write(b"\n]\n")
        self._file.close()
