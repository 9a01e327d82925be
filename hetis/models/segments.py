"""What a layer loop computes besides attention, cut where attention comes between.

A `LayerSegments` computes all from one attention to the next. There are two: separate operators, for every device and
model, and one native call for CPUs; both give the same bits. T tokens, H hidden size, G head groups of this shard, M
query heads per group, D head_dim, F MLP columns of this shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from hetis.core.model_spec import ModelSpec
from hetis.models.layers import LayerWeights, StageWeights, activate, add_and_normalise, normalise
from hetis_kernels import gated_activation, qk_norm_rope
from hetis_kernels.layer_segments import MLP, OUTPUT, PARTS, QKV, layer_tensors, native_segments, serves
from hetis_kernels.linear import linear


class Reduce(Protocol):
    """In-place sum over the tensor-parallel ranks of the stage; a no-op for one rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_reduce(self, x: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class Workspace:
    """Buffers of the layer loop, allocated once; `of(T)` returns views for a step of T tokens."""

    hidden_TH: Tensor
    normed_TH: Tensor
    delta_TH: Tensor  # output of attention or of the MLP, added to the residual stream
    qkv_TGHD: Tensor
    attended_TGMD: Tensor
    gate_up_TF: Tensor
    active_TF: Tensor

    @classmethod
    def allocate(cls, spec: ModelSpec, weights: StageWeights, max_tokens: int) -> "Workspace":
        """Buffers for steps of at most `max_tokens` tokens, on the device and in the dtype of the weights."""
        groups, columns = weights.primary.num_groups, weights.primary.num_mlp_columns
        like = weights.layers[0].attention_norm.weight

        def buffer(*shape: int) -> Tensor:
            return torch.empty(max_tokens, *shape, dtype=like.dtype, device=like.device)

        gate_up_TF = buffer(spec.gate_factor * columns)
        return cls(
            hidden_TH=buffer(spec.hidden_size),
            normed_TH=buffer(spec.hidden_size),
            delta_TH=buffer(spec.hidden_size),
            qkv_TGHD=buffer(groups, spec.heads_per_group, spec.head_dim),
            attended_TGMD=buffer(groups, spec.queries_per_group, spec.head_dim),
            gate_up_TF=gate_up_TF,
            active_TF=buffer(columns) if spec.gated else gate_up_TF,
        )

    def of(self, num_tokens: int) -> "Workspace":
        """Views of the first `num_tokens` tokens of the buffers."""
        return Workspace(*(getattr(self, field.name)[:num_tokens] for field in fields(self)))


class LayerSegments(Protocol):
    """Segments of the layers of one stage and shard, which read and write buffers of a `Workspace`.

    After `before` or `between` qkv_TGHD holds the input of the attention, which writes attended_TGMD. After `after`
    delta_TH is what remains to be added to the residual stream.
    """

    def begin(self, w: Workspace, hidden_TH: Tensor, position_T: Tensor) -> None:
        """Begins a step. `w`: views for its tokens; `hidden_TH`: the residual stream, changed in place."""

    def before(self) -> None:
        """From the residual stream to the QKV of layer 0."""

    def between(self, layer: int) -> None:
        """From the attention of `layer` to the QKV of the next one."""

    def after(self, layer: int) -> None:
        """From the attention of `layer`, the last one that is computed, to its end."""


def layer_segments(
    spec: ModelSpec, weights: StageWeights, reduce: Reduce, workspace: Workspace, cos_sin_PR: Tensor | None
) -> list[tuple[int, LayerSegments]]:
    """Implementations with the most tokens of a step that each serves, the preferred one first."""
    separate = SeparateOperators(spec, weights.layers, reduce, cos_sin_PR)
    found: list[tuple[int, LayerSegments]] = [(len(workspace.hidden_TH), separate)]
    if most := _native_tokens(spec, weights.layers):
        found.insert(0, (most, NativeOperators(spec, weights.layers, reduce, workspace, cos_sin_PR)))
    return found


def _native_tokens(spec: ModelSpec, layers: Sequence[LayerWeights]) -> int:
    """Most tokens of a step that `NativeOperators` serves; 0: not this model or shard."""
    if spec.norm != "rms" or not spec.gated:
        return 0
    return serves(*(linear for layer in layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)))


class SeparateOperators:
    """One call for each operator."""

    def __init__(
        self, spec: ModelSpec, layers: Sequence[LayerWeights], reduce: Reduce, cos_sin_PR: Tensor | None
    ) -> None:
        self._spec, self._layers, self._reduce, self._cos_sin_PR = spec, layers, reduce, cos_sin_PR
        self._w: Workspace
        self._hidden_TH = self._position_T = torch.empty(0)

    def begin(self, w: Workspace, hidden_TH: Tensor, position_T: Tensor) -> None:
        self._w, self._hidden_TH, self._position_T = w, hidden_TH, position_T

    def before(self) -> None:
        normalise(self._hidden_TH, self._layers[0].attention_norm, self._spec, self._w.normed_TH)
        self._qkv(self._layers[0])

    def between(self, layer: int) -> None:
        self.after(layer)
        following = self._layers[layer + 1]
        add_and_normalise(self._w.delta_TH, self._hidden_TH, following.attention_norm, self._spec, self._w.normed_TH)
        self._qkv(following)

    def after(self, layer: int) -> None:
        weights, w = self._layers[layer], self._w
        linear(w.attended_TGMD.flatten(1), weights.output, w.delta_TH)
        self._reduce.all_reduce(w.delta_TH)
        add_and_normalise(w.delta_TH, self._hidden_TH, weights.mlp_norm, self._spec, w.normed_TH)
        linear(w.normed_TH, weights.gate_up, w.gate_up_TF)
        if self._spec.gated:
            gated_activation(w.gate_up_TF, self._spec.activation, w.active_TF)
        else:
            activate(w.gate_up_TF, self._spec.activation)
        linear(w.active_TF, weights.down, w.delta_TH)
        self._reduce.all_reduce(w.delta_TH)

    def _qkv(self, weights: LayerWeights) -> None:
        w = self._w
        linear(w.normed_TH, weights.qkv, w.qkv_TGHD.flatten(1))
        if self._cos_sin_PR is not None or weights.query_norm is not None:
            qk_norm_rope(
                w.qkv_TGHD,
                self._spec.queries_per_group,
                weights.query_norm,
                weights.key_norm,
                self._spec.norm_epsilon,
                self._cos_sin_PR,
                self._position_T,
            )


class NativeOperators:
    """One native call from one attention to the next, three where sums over ranks come between."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: Sequence[LayerWeights],
        reduce: Reduce,
        workspace: Workspace,
        cos_sin_PR: Tensor | None,
    ) -> None:
        _, *buffers = (getattr(workspace, field.name) for field in fields(workspace))
        self._reduce, self._delta_TH = reduce, workspace.delta_TH
        self._native = native_segments(spec.activation, spec.norm_epsilon, cos_sin_PR, buffers)
        for layer in layers:
            self._native.add_layer(
                layer_tensors(
                    layer.attention_norm.weight,
                    layer.qkv,
                    (layer.query_norm, layer.key_norm),
                    layer.output,
                    layer.mlp_norm.weight,
                    layer.gate_up,
                    layer.down,
                )
            )

    def begin(self, w: Workspace, hidden_TH: Tensor, position_T: Tensor) -> None:
        self._delta_TH = w.delta_TH
        self._native.begin(hidden_TH, position_T)

    def before(self) -> None:
        self._native.run(QKV, QKV + 1)

    def between(self, layer: int) -> None:
        self._run(PARTS * layer + OUTPUT, PARTS * (layer + 1) + QKV + 1)

    def after(self, layer: int) -> None:
        self._run(PARTS * layer + OUTPUT, PARTS * layer + MLP + 1)

    def _run(self, begin: int, end: int) -> None:
        if self._reduce.size == 1:
            self._native.run(begin, end)
            return
        for part in range(begin, end):
            self._native.run(part, part + 1)
            if part % PARTS != QKV:
                self._reduce.all_reduce(self._delta_TH)
