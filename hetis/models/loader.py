"""Weights of one stage and shard, read slice by slice into their final, fused form.

A rank reads only what it keeps, and packs it in place; peak host memory is its own weights plus the largest single
tensor. G head groups of this shard, M query heads per group, D head_dim, H hidden size, F MLP columns of this shard.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hetis.core.model_spec import ModelSpec
from hetis.core.plan import Plan
from hetis.models.checkpoint import Checkpoint, DummyWeights, WeightSource
from hetis.models.families import FAMILIES
from hetis.models.layers import LayerWeights, Norm, StageWeights
from hetis.models.tensor_names import TensorNames, expected_tensors
from hetis_kernels.linear import PackedLinear, empty_weight, pack_linear

LOAD_FORMATS = ("auto", "safetensors", "dummy")


def load_weights(
    spec: ModelSpec,
    plan: Plan,
    stage_index: int,
    tp_index: int,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
    enforce_eager: bool = False,
    show_progress: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> StageWeights:
    """Weights of one primary, converted to `dtype` on `device`.

    `load_format`: "auto" and "safetensors" read `directory`; "dummy" generates random weights from `seed`, the same
    under any plan. `enforce_eager`: torch computes the linear layers. `show_progress`: a bar on stderr;
    `on_progress(done, total)` is called after every layer. Raises ValueError, one sentence with file, tensor and
    remedy, for checkpoints that are missing, incomplete, damaged or of another model.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format {load_format!r} is unknown; use one of {', '.join(LOAD_FORMATS)}.")
    names = FAMILIES[spec.family].names
    source: WeightSource
    if load_format == "dummy":
        source = DummyWeights(expected_tensors(spec, names), dtype, seed)
    else:
        source = Checkpoint(directory, spec)
    shard = _Shard(spec, plan, stage_index, tp_index, names, source, dtype, device, enforce_eager)
    with _progress_bar(show_progress, "loading weights") as bar:
        return shard.load(on_progress or bar)


class _Shard:
    """Reader of one primary's weights."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        stage_index: int,
        tp_index: int,
        names: TensorNames,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        enforce_eager: bool,
    ) -> None:
        self._spec, self._names, self._source = spec, names, source
        self._pack = partial(pack_linear, plain=enforce_eager, in_place=True)
        self._stage, self._tp_index = plan.stages[stage_index], tp_index
        self._primary = self._stage.primaries[tp_index]
        self._is_first, self._is_last = plan.is_first(stage_index), plan.is_last(stage_index)
        self._dtype, self._device = dtype, device

    def load(self, on_progress: Callable[[int, int], None]) -> StageWeights:
        first, stop = self._stage.layers
        layers = []
        for index in range(first, stop):
            layers.append(self._layer(self._names.layer.format(layer=index)))
            on_progress(index + 1 - first, stop - first)
        embedding = self._embedding() if self._is_first else None  # before the head, which may be the same
        return StageWeights(
            stage=self._stage,
            tp_index=self._tp_index,
            layers=tuple(layers),
            embedding=embedding,
            positions=self._positions() if self._is_first and self._tp_index == 0 else None,
            final_norm=self._norm(self._names.final_norm) if self._is_last else None,
            head=self._head(embedding) if self._is_last else None,
        )

    def _layer(self, prefix: str) -> LayerWeights:
        spec, names = self._spec, self._names
        return LayerWeights(
            attention_norm=self._norm(prefix + names.attention_norm),
            qkv=self._qkv(prefix),
            query_norm=self._whole(prefix + names.query_norm + ".weight") if spec.qk_norm else None,
            key_norm=self._whole(prefix + names.key_norm + ".weight") if spec.qk_norm else None,
            output=self._row_parallel(prefix + names.output, self._query_rows(), spec.output_bias),
            mlp_norm=self._norm(prefix + names.mlp_norm),
            gate_up=self._gate_up(prefix),
            down=self._row_parallel(prefix + names.down, self._primary.mlp_columns, spec.mlp_bias),
        )

    def _qkv(self, prefix: str) -> PackedLinear:
        """Query, key and value rows interleaved per head group: [G, M + 2, D, H]."""
        spec, names = self._spec, self._names
        queries, head_dim = spec.queries_per_group, spec.head_dim
        parts = (
            (names.query, slice(0, queries), self._query_rows()),
            (names.key, slice(queries, queries + 1), self._key_rows()),
            (names.value, slice(queries + 1, queries + 2), self._key_rows()),
        )
        heads_GHD = (self._primary.num_groups, spec.heads_per_group, head_dim)
        weight_NK = self._matrix(math.prod(heads_GHD), spec.hidden_size)
        weight_GHDK = weight_NK.view(*heads_GHD, spec.hidden_size)
        bias_GHD = self._empty(*heads_GHD) if spec.qkv_bias else None
        for name, heads, rows in parts:
            self._source.fill(weight_GHDK[:, heads], f"{prefix}{name}.weight", rows)
            if bias_GHD is not None:
                self._source.fill(bias_GHD[:, heads], f"{prefix}{name}.bias", rows)
        return self._pack(weight_NK, None if bias_GHD is None else bias_GHD.flatten())

    def _gate_up(self, prefix: str) -> PackedLinear:
        """Gate rows, then up rows: [2F, H]; up rows alone without a gate."""
        spec, names, columns = self._spec, self._names, self._primary.mlp_columns
        parts = (names.gate, names.up) if spec.gated else (names.up,)
        num_columns = self._primary.num_mlp_columns
        weight_NK = self._matrix(len(parts) * num_columns, spec.hidden_size)
        weight_PFK = weight_NK.view(len(parts), num_columns, spec.hidden_size)
        bias_PF = self._empty(len(parts), num_columns) if spec.mlp_bias else None
        for index, name in enumerate(parts):
            self._source.fill(weight_PFK[index], f"{prefix}{name}.weight", columns)
            if bias_PF is not None:
                self._source.fill(bias_PF[index], f"{prefix}{name}.bias", columns)
        return self._pack(weight_NK, None if bias_PF is None else bias_PF.flatten())

    def _row_parallel(self, name: str, columns: tuple[int, int], has_bias: bool) -> PackedLinear:
        """All rows and this shard's columns. Only index 0 has the bias, so that the sum over ranks adds it once."""
        weight_HF = self._matrix(self._spec.hidden_size, columns[1] - columns[0])
        self._source.fill(weight_HF, f"{name}.weight", columns=columns)
        return self._pack(weight_HF, self._whole(f"{name}.bias") if has_bias and self._tp_index == 0 else None)

    def _embedding(self) -> PackedLinear:
        """Rows of the embedding: packed only if they are those of the LM head, too, as single rows are read slower."""
        if self._is_last and self._spec.tied_embeddings:
            return self._pack(self._vocabulary(self._names.embedding, self._matrix))
        return pack_linear(self._vocabulary(self._names.embedding, self._empty), plain=True)

    def _head(self, embedding: PackedLinear | None) -> PackedLinear:
        """Rows of the LM head; a tied head is the embedding if this rank holds both."""
        if not self._spec.tied_embeddings:
            return self._pack(self._vocabulary(self._names.head, self._matrix))
        return self._embedding() if embedding is None else embedding

    def _vocabulary(self, name: str, make: Callable[[int, int], Tensor]) -> Tensor:
        table_VH = make(self._primary.num_vocab_rows, self._spec.hidden_size)
        self._source.fill(table_VH, f"{name}.weight", self._primary.vocab_rows)
        return table_VH

    def _positions(self) -> Tensor | None:
        if self._spec.learned_position_offset is None:
            return None
        return self._whole(f"{self._names.positions}.weight")

    def _norm(self, name: str) -> Norm:
        return Norm(self._whole(f"{name}.weight"), self._whole(f"{name}.bias") if self._spec.norm == "layer" else None)

    def _whole(self, name: str) -> Tensor:
        target = self._empty(*self._source.shape(name))
        self._source.fill(target, name)
        return target

    def _query_rows(self) -> tuple[int, int]:
        first, stop = self._key_rows()
        return first * self._spec.queries_per_group, stop * self._spec.queries_per_group

    def _key_rows(self) -> tuple[int, int]:
        first, stop = self._primary.groups
        return first * self._spec.head_dim, stop * self._spec.head_dim

    def _matrix(self, num_rows: int, num_columns: int) -> Tensor:
        return empty_weight(num_rows, num_columns, self._dtype, self._device)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)


@contextmanager
def _progress_bar(show: bool, title: str) -> Iterator[Callable[[int, int], None]]:
    """Context with a callback (done, total) that updates a bar on stderr, if `show` and if stderr is a terminal."""
    if not show:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
