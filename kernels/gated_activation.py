"""Gate of a gated MLP: activation(gate) * up.

T tokens, F MLP columns.
"""

from collections.abc import Callable
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch.nn import functional

from .dispatch import Backend, check_floats, check_shape, select

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def gated_activation_ref(gate_up_TF2: torch.Tensor, activation: str, out_TF: torch.Tensor) -> None:
    """The formula of `gated_activation`."""
    _check(gate_up_TF2, activation, out_TF)
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    out_TF.copy_(ACTIVATIONS[activation](gate_TF.float()).to(gate_TF.dtype) * up_TF)


def gated_activation(
    gate_up_TF2: torch.Tensor, activation: str, out_TF: torch.Tensor, *, backend: Backend = "auto"
) -> None:
    """out = activation(gate) * up, in place; gate_up_TF2 [T, 2F] holds the F gate columns, then the F up columns.

    activation: "silu", "gelu" (erf), "gelu_tanh" or "relu", computed in float32 and rounded to the dtype before the
    product, as transformers does. One float dtype, contiguous rows. Raises ValueError for an unknown activation, wrong
    shapes, dtypes or devices.
    """
    select("gated_activation", backend, out_TF.device, gated_activation_ref, _launch)(gate_up_TF2, activation, out_TF)


def _check(gate_up_TF2: torch.Tensor, activation: str, out_TF: torch.Tensor) -> None:
    check_floats(gate_up_TF2=gate_up_TF2, out_TF=out_TF)
    check_shape("gate_up_TF2", gate_up_TF2, out_TF.shape[0], 2 * out_TF.shape[1])
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")


@triton.jit
@no_type_check
def _gated_activation_kernel(
    gate_up_pointer,
    out_pointer,
    num_columns,
    gate_up_stride,
    out_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate_pointer = gate_up_pointer + t * gate_up_stride + f
    gate = tl.load(gate_pointer, mask=f < num_columns, other=0.0).to(tl.float32)
    up = tl.load(gate_pointer + num_columns, mask=f < num_columns, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
        active = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        active = tl.maximum(gate, 0.0)
    dtype = out_pointer.dtype.element_ty
    product = active.to(dtype).to(tl.float32) * up
    tl.store(out_pointer + t * out_stride + f, product.to(dtype), mask=f < num_columns)


def _launch(gate_up_TF2: torch.Tensor, activation: str, out_TF: torch.Tensor) -> None:
    _check(gate_up_TF2, activation, out_TF)
    num_tokens, num_columns = out_TF.shape
    if out_TF.numel() == 0:
        return
    _gated_activation_kernel[(num_tokens, triton.cdiv(num_columns, 1024))](
        gate_up_TF2,
        out_TF,
        num_columns,
        gate_up_TF2.stride(0),
        out_TF.stride(0),
        ACTIVATION=activation,
        BLOCK_F=1024,
        enable_fp_fusion=True,
    )
