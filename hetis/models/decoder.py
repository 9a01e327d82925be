"""The decoder of one stage and one tensor-parallel shard, as pure computation.

Attention and reduction are passed in. T tokens, H hidden size, G head groups of this shard, M query heads per group,
D head_dim, F MLP columns of this shard, V vocabulary rows of this shard, N tokens whose logits are computed. G, F and V
may be 0: the tensors are then empty, and this shard adds zeros (or its bias) to the sums.
"""

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from hetis.core.model_spec import ModelSpec
from hetis.models.layers import LayerWeights, StageWeights, activate, add_and_normalise, normalise, rope_table
from hetis_kernels import gated_activation, qk_norm_rope
from hetis_kernels.linear import linear, weight_rows


class Attention(Protocol):
    """Causal attention of the step's tokens over their sequences. `layer` counts from 0 inside the stage."""

    def attend(self, layer: int, qkv_TGHD: Tensor, out_TGMD: Tensor) -> None: ...


class Reduce(Protocol):
    """In-place sum over the tensor-parallel ranks of the stage; a no-op for one rank."""

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


class Decoder:
    """Layers of one stage (with embedding, final norm and LM head where the stage has them) for one shard.

    `reduce` sums over the stage's tensor-parallel ranks. `max_tokens` bounds the tokens of a step, `max_position`
    (default: the model's) their positions.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: StageWeights,
        reduce: Reduce,
        *,
        max_tokens: int,
        device: torch.device,
        max_position: int | None = None,
    ) -> None:
        self._spec, self._weights, self._reduce = spec, weights, reduce
        self._workspace = Workspace.allocate(spec, weights, max_tokens)
        self._cos_sin_PR = rope_table(spec.rope, max_position or spec.max_position, device) if spec.rope else None

    def embed(self, token_T: Tensor, position_T: Tensor) -> Tensor:
        """Hidden states [T, H] of tokens (int64 [T]) at `position_T` (int64 [T]); first stage only.

        The vocabulary is sharded: a rank adds zero for tokens of other shards; the sum over ranks is the embedding.
        The result is a buffer of the decoder, valid until the next call.
        """
        embedding = self._weights.embedding
        assert embedding is not None, "only the first stage embeds"
        hidden_TH = self._workspace.hidden_TH[: token_T.shape[0]]
        first, stop = self._weights.primary.vocab_rows
        if stop - first == self._spec.vocab_size:
            weight_rows(embedding, token_T, hidden_TH)
        elif stop == first:
            hidden_TH.zero_()
        else:
            local_T = token_T - first
            weight_rows(embedding, local_T.clamp(0, stop - first - 1), hidden_TH)
            hidden_TH.masked_fill_(((local_T < 0) | (local_T >= stop - first))[:, None], 0.0)
        if self._weights.positions is not None:
            hidden_TH += self._weights.positions[position_T + (self._spec.learned_position_offset or 0)]
        self._reduce.all_reduce(hidden_TH)
        return hidden_TH

    @property
    def num_layers(self) -> int:
        return len(self._weights.layers)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the matrices in one layer of this shard."""
        layer = self._weights.layers[0]
        return sum(part.weight.nbytes for part in (layer.qkv, layer.output, layer.gate_up, layer.down))

    def forward(
        self, hidden_TH: Tensor, position_T: Tensor, attention: Attention, *, num_layers: int | None = None
    ) -> Tensor:
        """The residual stream [T, H] after all layers of the stage, computed in place in `hidden_TH`.

        `num_layers`: number of layers to compute, for measurements; None: all.
        """
        w = self._workspace.of(hidden_TH.shape[0])
        for index, layer in enumerate(self._weights.layers[:num_layers]):
            if index == 0:
                normalise(hidden_TH, layer.attention_norm, self._spec, w.normed_TH)
            else:
                add_and_normalise(w.delta_TH, hidden_TH, layer.attention_norm, self._spec, w.normed_TH)
            self._attention(index, layer, w, position_T, attention)
            add_and_normalise(w.delta_TH, hidden_TH, layer.mlp_norm, self._spec, w.normed_TH)
            self._mlp(layer, w)
        return hidden_TH.add_(w.delta_TH)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of this shard's vocabulary rows, in the dtype of the weights; last stage only."""
        weights = self._weights
        assert weights.final_norm is not None, "only the last stage has logits"
        assert weights.head is not None, "only the last stage has logits"
        normed_NH = torch.empty_like(hidden_NH)
        normalise(hidden_NH, weights.final_norm, self._spec, normed_NH)
        return linear(normed_NH, weights.head)

    def _attention(
        self, index: int, layer: LayerWeights, w: Workspace, position_T: Tensor, attention: Attention
    ) -> None:
        """delta = sum over ranks of attention(normed) @ output."""
        linear(w.normed_TH, layer.qkv, w.qkv_TGHD.flatten(1))
        if self._cos_sin_PR is not None or layer.query_norm is not None:
            qk_norm_rope(
                w.qkv_TGHD,
                self._spec.queries_per_group,
                layer.query_norm,
                layer.key_norm,
                self._spec.norm_epsilon,
                self._cos_sin_PR,
                position_T,
            )
        attention.attend(index, w.qkv_TGHD, w.attended_TGMD)
        linear(w.attended_TGMD.flatten(1), layer.output, w.delta_TH)
        self._reduce.all_reduce(w.delta_TH)

    def _mlp(self, layer: LayerWeights, w: Workspace) -> None:
        """delta = sum over ranks of activation(normed @ gate_up) @ down."""
        linear(w.normed_TH, layer.gate_up, w.gate_up_TF)
        if self._spec.gated:
            gated_activation(w.gate_up_TF, self._spec.activation, w.active_TF)
        else:
            activate(w.gate_up_TF, self._spec.activation)
        linear(w.active_TF, layer.down, w.delta_TH)
        self._reduce.all_reduce(w.delta_TH)
