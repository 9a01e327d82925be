"""Safetensors files of a checkpoint, and the location of each tensor of the model in them. Reads headers only.

Does not import torch, so that a front end can refuse a checkpoint before any process is started.
"""

import json
import logging
import os.path
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta
from msgspec.structs import replace
from safetensors import SafetensorError, safe_open

from hetis.core.model_spec import ModelSpec
from hetis.models.families import FAMILIES
from hetis.models.json_files import decode, read_object, shown
from hetis.models.tensor_names import expected_tensors

INDEX = "model.safetensors.index.json"
_FLOATS = ("BF16", "F16", "F32")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Written by old exporters; derived from config.json.
_IGNORED_TENSORS = ("rotary_emb.inv_freq", "decoder.version")
_COMPARE_BYTES = 1 << 18  # read at once; 1 MiB takes six times as long (newly mapped memory every time)

_logger = logging.getLogger(__name__)


class StoredTensor(NamedTuple):
    file: Path
    name: str  # in that file
    shape: tuple[int, ...]
    dtype: str


class _IndexKeys(msgspec.Struct, frozen=True):
    weight_map: Annotated[dict[str, str], Meta(description="an object with a file name per tensor name")]


def find_tensors(directory: Path, spec: ModelSpec) -> dict[str, StoredTensor]:
    """Location of every tensor of the model, by name.

    Names without the leading "model." are accepted. Where embedding and LM head are tied, a checkpoint may hold either
    (returned under the embedding's name) or both. Raises ValueError, one sentence with file, tensor and remedy, for
    files that are missing or damaged, and tensors that are missing, unknown, of the wrong shape or not floating point.
    """
    found = _read_headers(_weight_files(directory))
    expected = expected_tensors(spec, FAMILIES[spec.family].names)
    embedding, head = _tied_names(spec)
    known = expected | {head: expected[embedding]}
    entries: dict[str, StoredTensor] = {}
    for name, entry in found.items():
        full = name if name in known else f"model.{name}"
        if full in known:
            entries[full] = entry
        elif not name.endswith(_IGNORED_TENSORS):
            raise ValueError(
                f"{entry.file} has tensor {shown(name)}, which the model of config.json does not have; use the "
                f"config.json that belongs to this checkpoint."
            )
    if spec.tied_embeddings and embedding not in entries and head in entries:
        entries[embedding] = entries.pop(head)
    missing = [name for name in expected if name not in entries]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{directory} has no tensor {missing[0]}{more}; download the checkpoint again.")
    for name, entry in entries.items():
        _check(entry, known[name])
    return entries


def _tied_names(spec: ModelSpec) -> tuple[str, str]:
    """Names of the weights of embedding and LM head."""
    names = FAMILIES[spec.family].names
    return f"{names.embedding}.weight", f"{names.head}.weight"


def with_own_head(spec: ModelSpec, directory: Path) -> ModelSpec:
    """Spec without tied embeddings if the checkpoint holds an LM head that differs from the embedding.

    transformers and vLLM use such a head even if config.json ties it; a warning is logged. Equal values stay tied.
    Reads both tensors, if both exist, up to the first difference. Raises the errors of `find_tensors`.
    """
    if not spec.tied_embeddings:
        return spec
    tensors = find_tensors(directory, spec)
    embedding, head = (tensors.get(name) for name in _tied_names(spec))
    assert embedding is not None
    if head is None or _are_equal(embedding, head):
        return spec
    _logger.warning(
        "%s says tie_word_embeddings, but tensor %s differs from %s: it is used as the LM head.",
        directory / "config.json",
        head.name,
        embedding.name,
    )
    return replace(spec, tied_embeddings=False)


def damaged(path: Path, error: Exception) -> ValueError:
    """Error for a file that safetensors cannot read."""
    reason = " ".join(str(error).split())  # it may quote names that contain line breaks
    return ValueError(f"{path} is damaged or truncated ({reason}); download it again.")


def _weight_files(directory: Path) -> list[Path]:
    """Files of the checkpoint: those that the index names, else all safetensors files."""
    index = directory / INDEX
    if index.exists():
        return _indexed_files(index)
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


def _indexed_files(index: Path) -> list[Path]:
    values = read_object(index)
    try:
        names = sorted(set(decode(_IndexKeys, values).weight_map.values()))
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from error
    for name in names:
        if os.path.basename(name) != name or not os.path.isfile(index.parent / name):
            raise ValueError(
                f"{index}: weight_map names {shown(name)}, which does not exist beside it; download it again."
            )
    return [index.parent / name for name in names]


def _read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if name in found:
                        raise ValueError(
                            f"tensor {name} is in both {found[name].file} and {path}; remove one of the files."
                        )
                    view = file.get_slice(name)
                    found[name] = StoredTensor(path, name, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error
    return found


def _check(entry: StoredTensor, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise ValueError(
            f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)} but config.json asks for {list(shape)}; "
            f"use the config.json that belongs to this checkpoint."
        )
    if entry.dtype not in _FLOATS:
        raise ValueError(
            f"{entry.file}: tensor {entry.name} has dtype {entry.dtype}; only unquantised checkpoints "
            f"({', '.join(_FLOATS)}) are supported."
        )


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of one shape have the same dtype and bits."""
    if one.dtype != other.dtype:
        return False
    (first, left), (second, _) = _data_range(one), _data_range(other)
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(first)
        b.seek(second)
        while left > 0:
            size = min(left, _COMPARE_BYTES)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True


def _data_range(entry: StoredTensor) -> tuple[int, int]:
    """(offset, size) of the values in bytes. A file begins with the header's length (8 bytes, little-endian) and it."""
    with entry.file.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[entry.name]["data_offsets"]
    return 8 + length + begin, end - begin
