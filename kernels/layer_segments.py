"""All that a layer loop computes between two attentions, as one native call on the CPU.

A layer has three parts, counted through all layers: 3 * layer + QKV (norm, QKV, query/key norm, rope), + OUTPUT (output
projection), + MLP (norm, gate and up, activation, down). Kernels and bits are those of the separate operations.

T tokens, H hidden size, G head groups, M query heads per group, D head_dim, F MLP columns, P positions, R rotary dims.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import extension
from .linear import PackedLinear

PARTS = 3  # of a layer
QKV, OUTPUT, MLP = range(PARTS)


class NativeSegments(Protocol):
    """The C++ class."""

    def add_layer(self, tensors: Sequence[Tensor | None]) -> None:
        """Weights of the next layer, in the order of `layer_tensors`."""

    def begin(self, hidden_TH: Tensor, position_T: Tensor) -> None:
        """Checks and keeps the residual stream and the int64 positions of a step."""

    def run(self, begin: int, end: int) -> None:
        """Computes the parts [begin, end)."""


def native_segments(
    activation: str, epsilon: float, cos_sin_PR: Tensor | None, buffers: Sequence[Tensor]
) -> NativeSegments:
    """An object without layers. The extension must be loaded (`serves`).

    `buffers`, contiguous, of one float dtype, for the largest step: normed [T, H], delta [T, H] (what `OUTPUT` and
    `MLP` write and the next norm adds), qkv [T, G, M + 2, D], attended [T, G, M, D], gate_up [T, 2F], active [T, F].
    `activation`: as in `gated_activation`. Raises ValueError for wrong shapes, dtypes or devices, as its methods do.
    """
    made: NativeSegments = torch.classes.hetis.LayerSegments(activation, epsilon, cos_sin_PR, list(buffers))
    return made


def layer_tensors(
    attention_norm_H: Tensor,
    qkv: PackedLinear,
    head_norms_D: tuple[Tensor | None, Tensor | None],
    output: PackedLinear,
    mlp_norm_H: Tensor,
    gate_up: PackedLinear,
    down: PackedLinear,
) -> list[Tensor | None]:
    """The weights of one layer for `add_layer`."""
    return [
        *(attention_norm_H, qkv.weight, qkv.bias, *head_norms_D, output.weight, output.bias),
        *(mlp_norm_H, gate_up.weight, gate_up.bias, down.weight, down.bias),
    ]


def serves(*linears: PackedLinear) -> int:
    """Most tokens of a step for which the CPU kernel computes all of these layers; 0: there is none for one of them."""
    if not all(each.is_packed and each.num_outputs and each.num_inputs for each in linears) or not extension.load():
        return 0
    return int(torch.ops.hetis.segments_max_tokens(linears[0].weight.dtype))
