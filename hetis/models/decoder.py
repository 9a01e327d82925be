"""The decoder of one stage and one tensor-parallel shard, as pure computation.

Attention and reduction are passed in. T tokens, H hidden size, G head groups of this shard, M query heads per group,
D head_dim, F MLP columns of this shard, V vocabulary rows of this shard, N tokens whose logits are computed. G, F and V
may be 0: the tensors are then empty, and this shard adds zeros (or its bias) to the sums.
"""

from typing import Protocol

import torch
from torch import Tensor

from hetis.core.model_spec import ModelSpec
from hetis.models.layers import StageWeights, normalise, rope_table
from hetis.models.segments import Reduce, Workspace, layer_segments
from hetis_kernels.linear import linear, weight_rows


class Attention(Protocol):
    """Causal attention of the step's tokens over their sequences. `layer` counts from 0 inside the stage."""

    def attend(self, layer: int, qkv_TGHD: Tensor, out_TGMD: Tensor) -> None: ...


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
        cos_sin_PR = rope_table(spec.rope, max_position or spec.max_position, device) if spec.rope else None
        self._segments = layer_segments(spec, weights, reduce, self._workspace, cos_sin_PR)

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
        num_tokens = hidden_TH.shape[0]
        w = self._workspace.of(num_tokens)
        segments = next(each for most, each in self._segments if num_tokens <= most)
        last = (self.num_layers if num_layers is None else min(num_layers, self.num_layers)) - 1
        segments.begin(w, hidden_TH, position_T)
        segments.before()
        for layer in range(last):
            attention.attend(layer, w.qkv_TGHD, w.attended_TGMD)
            segments.between(layer)
        attention.attend(last, w.qkv_TGHD, w.attended_TGMD)
        segments.after(last)
        return hidden_TH.add_(w.delta_TH)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of this shard's vocabulary rows, in the dtype of the weights; last stage only."""
        weights = self._weights
        assert weights.final_norm is not None, "only the last stage has logits"
        assert weights.head is not None, "only the last stage has logits"
        normed_NH = torch.empty_like(hidden_NH)
        normalise(hidden_NH, weights.final_norm, self._spec, normed_NH)
        return linear(normed_NH, weights.head)
