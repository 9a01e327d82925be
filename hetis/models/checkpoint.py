"""Sources of weights: safetensors files, or random values (dummy weights). Both give slices of named tensors.

Tensor names are those of `TensorNames`.
"""

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hetis.core.model_spec import ModelSpec
from hetis.core.spans import Span
from hetis.models.tensor_names import Shapes
from hetis.models.weight_files import damaged, find_tensors


class WeightSource(Protocol):
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    def fill(self, target: Tensor, name: str, rows: Span | None = None, columns: Span | None = None) -> None:
        """Copies the tensor, or its part within the row and column spans, row-major into `target` of the same size."""


class Checkpoint:
    """Safetensors files of a directory, checked against the model.

    The constructor reads headers only. Raises the errors of `find_tensors`.
    """

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        self._entries = find_tensors(directory, spec)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def fill(self, target: Tensor, name: str, rows: Span | None = None, columns: Span | None = None) -> None:
        entry = self._entries[name]
        index = tuple(slice(*span) if span else slice(None) for span in (rows, columns))[: len(entry.shape)]
        # The file is mapped again for every tensor: pages read so far count as memory of this process until unmapped.
        try:
            with safe_open(entry.file, framework="pt") as file:
                target.copy_(file.get_slice(entry.name)[index].reshape(target.shape))
        except (SafetensorError, OSError) as error:
            raise damaged(entry.file, error) from error


class DummyWeights:
    """Random weights that depend on name, shape and seed alone: N(0, 0.02), norm weights 1. Slices equal the whole.

    Every tensor is a window into one repeated table, which starts at a hash of name and seed. The table's length is
    prime, so that rows of a tensor do not repeat. A lookup costs no more than a copy.
    """

    PERIOD = 2**21 - 9  # prime
    DEVIATION = 0.02
    BLOCK_ROWS = 256  # rows generated at once where only some of their columns are kept

    def __init__(self, expected: Shapes, dtype: torch.dtype, seed: int) -> None:
        self._shapes, self._seed = expected, seed
        generator = torch.Generator().manual_seed(seed)
        self._table = torch.randn(self.PERIOD, generator=generator).mul_(self.DEVIATION).to(dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def fill(self, target: Tensor, name: str, rows: Span | None = None, columns: Span | None = None) -> None:
        shape = self._shapes[name]
        width = shape[1] if len(shape) == 2 else 1
        position = self._start(name) + (rows[0] if rows else 0) * width
        if len(shape) == 1 and name.endswith(".weight"):
            target.fill_(1.0)
        elif columns is None:
            self._copy_rows(target, position)
        else:
            for part in torch.split(target, self.BLOCK_ROWS):
                whole = torch.empty(part.shape[0], width, dtype=self._table.dtype)
                self._copy(whole.view(-1), position)
                part.copy_(whole[:, slice(*columns)])
                position += whole.numel()

    def _start(self, name: str) -> int:
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.PERIOD

    def _copy_rows(self, target: Tensor, position: int) -> None:
        """`_copy` for a target with gaps between its rows."""
        if target.is_contiguous():
            self._copy(target.view(-1), position)
            return
        for index, part in enumerate(target):
            self._copy_rows(part, position + index * part.numel())

    def _copy(self, target: Tensor, position: int) -> None:
        """Fills a vector with values of the repeated table, from `position` on."""
        while target.shape[0]:
            block = self._table[position % self.PERIOD :][: target.shape[0]]
            target[: block.shape[0]].copy_(block)
            target, position = target[block.shape[0] :], position + block.shape[0]
