"""Memory shared by benchmark and ranks, a file of float64 [ranks, columns]: requested and measured slowdown."""

import mmap
from enum import IntEnum
from pathlib import Path

import numpy as np


class Column(IntEnum):
    """The benchmark writes `SHARE`, at any time; the ranks write the other columns."""

    SHARE = 0
    WORK_S = 1  # CPU time of kernels bound by memory
    BUSY_S = 2  # wall time of these kernels, pauses included
    AWAITED = 3  # messages of slow links that the rank slept for
    ASKED_MS = 4  # requested delay of these messages, in all
    LATE_MS = 5  # excess over it, in all


class Board:
    """The whole file, mapped into every process."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.values = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.float64).reshape(-1, len(Column))

    @classmethod
    def create(cls, path: Path, shares: list[float]) -> "Board":
        path.write_bytes(bytes(8 * len(Column) * len(shares)))
        board = cls(path)
        board.values[:, Column.SHARE] = shares
        return board
