"""Starts an emulated fleet: a real one, whose processes have `shim/` on their Python path."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import msgspec

from hetis.core.config import EngineConfig
from hetis.core.messages import FleetQuery, FleetStats
from hetis.frontend.client import EngineClient
from hetis.launch.checks import plan_for

from .board import Board, Column
from .fleet import Emulation, Fleet
from .rank import BOARD, EMULATION, SETTINGS

HERE = Path(__file__).parent


class EmulatedFleet:
    """A context manager; leaving it ends all processes."""

    def __init__(self, fleet: Fleet, config: EngineConfig) -> None:
        """`config`: its dtype must be given; its plan and KV memory are replaced by the fleet's."""
        self._scratch = tempfile.TemporaryDirectory(prefix="hetis-emulation-")
        directory = Path(self._scratch.name)
        self._usable_cores = os.sched_getaffinity(0)
        first, last = min(self._usable_cores), max(self._usable_cores)
        settings = Emulation(fleet=fleet, primary_core=first, worker_core=last)
        (directory / SETTINGS).write_bytes(msgspec.json.encode(settings))
        self.board = Board.create(directory / BOARD, [member.share for member in fleet.members])
        config = msgspec.structs.replace(config, plan=fleet.plan)
        spec = plan_for(config)[1]
        token_bytes = spec.num_head_groups * spec.kv_bytes_per_token(spec.num_layers, config.dtype)
        memory = {rank: member.kv_tokens * token_bytes for rank, member in enumerate(fleet.members)}
        config = msgspec.structs.replace(config, kv_cache_memory=memory)
        os.sched_setaffinity(0, {last})  # inherited by all threads of the client
        with rank_environment(directory):
            self.client = EngineClient(config)
        try:
            self.ready = self.client.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def set_share(self, rank: int, share: float) -> None:
        """Changes the share of `rank` from now on."""
        self.board.values[rank, Column.SHARE] = share

    def stats(self) -> FleetStats:
        return self.client.ask(FleetQuery(), FleetStats)

    def measured(self) -> list["Measured"]:
        """Shares and delays so far, by rank."""
        return [measured(row) for row in self.board.values.tolist()]

    def close(self) -> None:
        self.client.close()
        os.sched_setaffinity(0, self._usable_cores)
        self._scratch.cleanup()

    def __enter__(self) -> "EmulatedFleet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Measured(msgspec.Struct, frozen=True):
    """Share and delays that one rank reached."""

    share: float  # CPU time over wall time of kernels bound by memory; 1 for a rank that is not slowed
    busy_s: float
    delay_ms: float  # requested delay, mean over the messages that the rank slept for
    late_ms: float  # excess over it, mean over the same messages


def measured(row: list[float]) -> Measured:
    """The figures of one row of the board."""
    share = row[Column.WORK_S] / row[Column.BUSY_S] if row[Column.BUSY_S] else 1.0
    awaited = max(1.0, row[Column.AWAITED])
    return Measured(share, row[Column.BUSY_S], row[Column.ASKED_MS] / awaited, row[Column.LATE_MS] / awaited)


@contextmanager
def rank_environment(directory: Path) -> Iterator[None]:
    """Sets, for the block, the environment in which processes of a fleet import the shim."""
    before = dict(os.environ)
    path = [str(HERE / "shim"), str(HERE.parent), *filter(None, [before.get("PYTHONPATH")])]
    os.environ |= {
        EMULATION: str(directory),
        "PYTHONPATH": os.pathsep.join(path),
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
