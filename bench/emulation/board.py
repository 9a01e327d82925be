"""Memory shared by benchmark and ranks, a file of float64 [ranks, columns]: how slow to be, and how slow one was."""

import mmap
from enum import IntEnum
from pathlib import Path

import numpy as np


class Column(IntEnum):
    """`SHARE` is written by the benchmark, at any time; the others by the ranks."""

    SHARE = 0
    WORK_S = 1  # CPU time of kernels bound by memory
    BUSY_S = 2  # wall time that they took with their pauses
    AWAITED = 3  # messages of slow links for which the rank slept until they were due
    ASKED_MS = 4  # their delays, as they should be
    LATE_MS = 5  # how much later they were seen


class Board:
    """The whole file, in every process."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.values = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.float64).reshape(-1, len(Column))

    @classmethod
    def create(cls, path: Path, shares: list[float]) -> "Board":
        path.write_bytes(bytes(8 * len(Column) * len(shares)))
        board = cls(path)
        board.values[:, Column.SHARE] = shares
        return board
