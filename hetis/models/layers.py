"""Parts of a decoder: weights of one stage and shard, norms, activations, the rope table.

T tokens, G head groups of this shard, M query heads per group, D head_dim, H hidden size, F MLP columns of this shard,
V vocabulary rows of this shard, P positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hetis.core.model_spec import ModelSpec, RopeSpec
from hetis.core.plan import Primary, Stage
from hetis_kernels import add_rms_norm, rms_norm
from hetis_kernels.linear import PackedLinear


@dataclass(frozen=True)
class Norm:
    weight: Tensor  # [H]
    bias: Tensor | None = None  # [H]; layer norm only


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer and shard. Only tensor-parallel index 0 has biases of row-parallel layers (output, down)."""

    attention_norm: Norm
    qkv: PackedLinear  # [G * (M + 2) * D, H]: per group the M query heads, the key head, the value head
    query_norm: Tensor | None  # [D]
    key_norm: Tensor | None  # [D]
    output: PackedLinear  # [H, G * M * D]
    mlp_norm: Norm
    gate_up: PackedLinear  # [2F, H], gate then up; [F, H] without a gate
    down: PackedLinear  # [H, F]


@dataclass(frozen=True)
class StageWeights:
    """All weights of one primary."""

    stage: Stage
    tp_index: int
    layers: tuple[LayerWeights, ...]
    embedding: PackedLinear | None = None  # [V, H]; first stage
    positions: Tensor | None = None  # [P + offset, H]; first stage, tensor-parallel index 0
    final_norm: Norm | None = None  # last stage
    head: PackedLinear | None = None  # [V, H]; last stage

    @property
    def primary(self) -> Primary:
        return self.stage.primaries[self.tp_index]


def normalise(x_TH: Tensor, norm: Norm, spec: ModelSpec, out_TH: Tensor) -> None:
    """out = norm(x), with the model's kind of norm."""
    if spec.norm == "rms":
        rms_norm(x_TH, norm.weight, spec.norm_epsilon, out_TH)
    else:
        out_TH.copy_(functional.layer_norm(x_TH, x_TH.shape[-1:], norm.weight, norm.bias, spec.norm_epsilon))


def add_and_normalise(x_TH: Tensor, residual_TH: Tensor, norm: Norm, spec: ModelSpec, out_TH: Tensor) -> None:
    """residual += x in place, then out = norm(residual)."""
    if spec.norm == "rms":
        add_rms_norm(x_TH, residual_TH, norm.weight, spec.norm_epsilon, out_TH)
    else:
        residual_TH.add_(x_TH)
        normalise(residual_TH, norm, spec, out_TH)


def activate(x_TF: Tensor, activation: str) -> None:
    """In-place activation of an MLP without a gate. `activation`: as in `ModelSpec`."""
    if activation == "relu":
        x_TF.relu_()
    elif activation == "silu":
        functional.silu(x_TF, inplace=True)
    else:
        x_TF.copy_(functional.gelu(x_TF, approximate="tanh" if activation == "gelu_tanh" else "none"))


def rope_frequencies(rope: RopeSpec) -> Tensor:
    """Rotation per position of each pair of values: float32 [rotary_dim / 2], in radians.

    theta ** (-2i / rotary_dim). "linear" divides all of them by `factor`; "llama3" and "yarn" divide only those whose
    wavelength is long compared with the original context, and interpolate linearly in between: over the number of
    rotations within that context (Llama 3.1 report, section 3.4.2), or over the index of the pair (YaRN, arXiv
    2309.00071, section 3.2).
    """
    exponent = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    frequency = 1.0 / (rope.theta**exponent)
    if rope.scaling == "none":
        return frequency
    if rope.scaling == "linear":
        return frequency / rope.factor
    kept = _kept_by_llama3(rope, frequency) if rope.scaling == "llama3" else _kept_by_yarn(rope)
    return (1 - kept) * frequency / rope.factor + kept * frequency


def _kept_by_llama3(rope: RopeSpec, frequency: Tensor) -> Tensor:
    """Weight of the unscaled frequency: 1 for short wavelengths, 0 for long ones."""
    rotations = rope.original_max_position * frequency / (2 * math.pi)  # within the original context
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return kept.clamp(0.0, 1.0)


def _kept_by_yarn(rope: RopeSpec) -> Tensor:
    """Weight of the unscaled frequency: 1 up to the pair with beta_fast rotations, 0 from that with beta_slow on."""

    def pair_with(rotations: float) -> float:
        """Index of the pair that makes so many rotations within the original context."""
        wavelength = rope.original_max_position / rotations
        return rope.rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low or 0.001  # value of transformers: a step between two pairs
    pair = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
    return 1 - ((pair - low) / width).clamp(0.0, 1.0)


def rope_table(rope: RopeSpec, num_positions: int, device: torch.device) -> Tensor:
    """Table of cosines, then sines, of each position's angles, times `attention_factor`: float32 [P, rotary_dim]."""
    angle_PF = torch.arange(num_positions, dtype=torch.float32)[:, None] * rope_frequencies(rope)
    return torch.cat((angle_PF.cos(), angle_PF.sin()), dim=1).mul_(rope.attention_factor).to(device)
