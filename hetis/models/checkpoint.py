"""Where weights come from: safetensors files, or nothing at all (dummy weights). Both give slices of named tensors.

Names are those that `TensorNames` gives; files that leave out the leading "model." are read too.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hetis.core.plan import Span

Shapes = dict[str, tuple[int, ...]]

INDEX = "model.safetensors.index.json"
_FLOATS = {"F32", "BF16", "F16"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HARMLESS = (
    "rotary_emb.inv_freq",
    "decoder.version",
)  # written by old exporters; carries nothing that config.json does not


class WeightSource(Protocol):
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    def fill(self, target: Tensor, name: str, rows: Span | None = None, columns: Span | None = None) -> None:
        """Copy the tensor, or its rows and columns within the spans, in order into `target` of as many values."""


class _Entry(NamedTuple):
    file: Path
    name: str  # in that file
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The safetensors files of a directory, checked against the tensors that the model has (`expected`: name -> shape).

    `tied_names`: embedding and LM head where they are one, so that a checkpoint may hold either or both. Only headers
    are read here. Raises ValueError, one sentence with file, tensor and remedy: no safetensors, files missing, damaged
    or truncated, tensors missing, unknown, of the wrong shape or not floating point.
    """

    def __init__(self, directory: Path, expected: Shapes, tied_names: tuple[str, str] | None) -> None:
        found = _read_headers(_weight_files(directory))
        self._entries = _match(directory, found, expected, tied_names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def fill(self, target: Tensor, name: str, rows: Span | None = None, columns: Span | None = None) -> None:
        entry = self._entries[name]
        index = tuple(slice(*span) if span else slice(None) for span in (rows, columns))[: len(entry.shape)]
        # The file is mapped anew for every tensor: pages once read count as this process's memory until it is unmapped.
        try:
            with safe_open(entry.file, framework="pt") as file:
                target.copy_(file.get_slice(entry.name)[index].reshape(target.shape))
        except (SafetensorError, OSError) as error:
            raise _damaged(entry.file, error) from error


class DummyWeights:
    """Random weights from names and shapes alone: N(0, 0.02), norm weights 1. Any slicing sees the same values.

    All tensors are windows into one endless repetition of a table of prime length (so that rows never repeat), each
    starting at a place given by its name and the seed. Making a table lookup of it costs no more than copying.
    """

    PERIOD = 2**21 - 9  # prime
    DEVIATION = 0.02
    BLOCK_ROWS = 256  # rows made at once where only some of their columns are kept

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
            for part in [target] if target.is_contiguous() else target:
                self._copy(part.view(-1), position)
                position += part.numel()
        else:
            for part in torch.split(target, self.BLOCK_ROWS):
                whole = torch.empty(part.shape[0], width, dtype=self._table.dtype)
                self._copy(whole.view(-1), position)
                part.copy_(whole[:, slice(*columns)])
                position += whole.numel()

    def _start(self, name: str) -> int:
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.PERIOD

    def _copy(self, target: Tensor, position: int) -> None:
        """Values from `position` on of the endless table, into a vector."""
        while target.shape[0]:
            block = self._table[position % self.PERIOD :][: target.shape[0]]
            target[: block.shape[0]].copy_(block)
            target, position = target[block.shape[0] :], position + block.shape[0]


def _weight_files(directory: Path) -> list[Path]:
    """The files that make up the checkpoint: those named by the index, else all safetensors files."""
    index = directory / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} cannot be read ({error}); download it again.") from error
        for name in names:
            if not (directory / name).is_file():
                raise ValueError(f"{directory / name} is named by {INDEX} but does not exist; download it again.")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    others = [file for file in files if not file.name.startswith("consolidated")]  # a second copy in Mistral's format
    if others:
        return others
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles:
        raise ValueError(
            f"{directory} holds {pickles[0]} but no safetensors, and hetis never unpickles; save the model with "
            f"save_pretrained(safe_serialization=True) or use a revision with safetensors."
        )
    raise ValueError(f"{directory} holds no *.safetensors files; download the checkpoint again.")


def _read_headers(files: list[Path]) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if name in found:
                        raise ValueError(
                            f"tensor {name} is in both {found[name].file} and {path}; remove one of the files."
                        )
                    view = file.get_slice(name)
                    found[name] = _Entry(path, name, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    return found


def _match(
    directory: Path, found: dict[str, _Entry], expected: Shapes, tied_names: tuple[str, str] | None
) -> dict[str, _Entry]:
    """Our names -> entries; every expected tensor is there, in its shape, and nothing unknown besides."""
    entries: dict[str, _Entry] = {}
    for name, entry in found.items():
        full = name if name in expected or (tied_names and name in tied_names) else f"model.{name}"
        if full in expected or (tied_names and full in tied_names):
            entries[full] = entry
        elif not name.endswith(_HARMLESS):
            raise ValueError(
                f"{entry.file} has tensor {name}, which the model of config.json does not have; use the config.json "
                f"that belongs to this checkpoint."
            )
    if tied_names:
        embedding, head = tied_names
        copy = entries.pop(head, None)
        if copy is not None:
            entries.setdefault(embedding, copy)
    missing = [name for name in expected if name not in entries]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{directory} has no tensor {missing[0]}{more}; download the checkpoint again.")
    for name, shape in expected.items():
        entry = entries[name]
        if entry.shape != shape:
            raise ValueError(
                f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)} but config.json asks for "
                f"{list(shape)}; use the config.json that belongs to this checkpoint."
            )
        if entry.dtype not in _FLOATS:
            raise ValueError(
                f"{entry.file}: tensor {entry.name} has dtype {entry.dtype}; only unquantised checkpoints "
                f"({', '.join(sorted(_FLOATS))}) are supported."
            )
    return entries


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or truncated ({error}); download it again.")
