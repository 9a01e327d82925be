"""A file for chrome://tracing or ui.perfetto.dev with what every rank does in every step."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hetis.core.device_info import DeviceInfo
from hetis.core.files import refuse_pipe, unwritable
from hetis.core.messages import StepTimes
from hetis.core.plan import Plan
from hetis.core.step_times import Activity

FIELDS = 3  # activity, begin, end

_log = logging.getLogger(__name__)


class TraceFile:
    """Shows a process per rank and a thread per stage, with a bar for each step and below it one for each activity.

    The JSON array is closed at the end; viewers read one without its end, too.
    """

    def __init__(self, path: Path, plan: Plan, fleet: Sequence[DeviceInfo], epoch: float) -> None:
        """`epoch`: seconds; times are shown relative to it, so that a float64 keeps their microseconds.

        Raises ValueError when the file cannot be written, or is a pipe.
        """
        refuse_pipe(path, "trace file")  # opening it would wait for a reader; /dev/stdout is the pipe to rank 0
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise unwritable(path, "trace file", error) from error
        self._epoch, self._path, self._is_cut = epoch, path, False
        self._separator = b"[\n"
        for info in fleet:
            name = f"rank {info.rank}: {plan.role_of(info.rank)} on {info.device}"
            self._write({"ph": "M", "name": "process_name", "pid": info.rank, "args": {"name": name}})

    def add(self, times: StepTimes) -> None:
        for stage in times.stages:
            laps = np.frombuffer(stage.trace, dtype=np.float64).reshape(-1, FIELDS).tolist()
            counts = {"decodes": times.num_decodes, "prompt_tokens": times.num_prompt_tokens}
            counts |= {"heads": stage.heads, "page_layers": stage.num_page_layers}
            self._bar(times.rank, stage.stage, f"step {times.step}", laps[0][1], laps[-1][2], counts)
            for activity, begin, end in laps:
                self._bar(times.rank, stage.stage, Activity(int(activity)).label, begin, end)

    def _bar(
        self, rank: int, stage: int, name: str, begin: float, end: float, counts: dict[str, int] | None = None
    ) -> None:
        start_us, duration_us = round(1e6 * (begin - self._epoch), 3), round(1e6 * (end - begin), 3)
        event = {"ph": "X", "name": name, "pid": rank, "tid": stage, "ts": start_us, "dur": duration_us}
        self._write(event if counts is None else event | {"args": counts})

    def _write(self, event: dict[str, Any]) -> None:
        with self._cut_off_when_full():
            self._file.write(self._separator + msgspec.json.encode(event))
        self._separator = b",\n"

    def close(self) -> None:
        with self._cut_off_when_full():
            self._file.write(b"\n]\n")
        with self._cut_off_when_full():
            self._file.close()

    @contextmanager
    def _cut_off_when_full(self) -> Iterator[None]:
        """Ends the trace with one warning when the disk is full; requests go on."""
        try:
            yield
        except OSError as error:
            if not self._is_cut:
                _log.warning("trace file %s is cut off: %s.", self._path, error.strerror)
            self._is_cut = True
