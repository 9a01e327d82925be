"""Root-mean-square norm, optionally after an addition to the residual stream.

T tokens, H hidden size.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .dispatch import Backend, check_floats, check_shape, select


def rms_norm_ref(x_TH: torch.Tensor, weight_H: torch.Tensor, epsilon: float, out_TH: torch.Tensor) -> None:
    """The formula of `rms_norm`, rounded where LlamaRMSNorm of transformers rounds."""
    _check(x_TH, None, weight_H, out_TH)
    x = x_TH.float()
    normalised_TH = (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)).to(x_TH.dtype)
    out_TH.copy_(weight_H * normalised_TH)


def add_rms_norm_ref(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, epsilon: float, out_TH: torch.Tensor
) -> None:
    """The formula of `add_rms_norm`."""
    _check(x_TH, residual_TH, weight_H, out_TH)
    residual_TH += x_TH
    rms_norm_ref(residual_TH, weight_H, epsilon, out_TH)


def rms_norm(
    x_TH: torch.Tensor, weight_H: torch.Tensor, epsilon: float, out_TH: torch.Tensor, *, backend: Backend = "auto"
) -> None:
    """out = weight * (x / sqrt(mean(x^2) + epsilon)), in place; out may be x.

    The norm is computed in float32, rounded to the dtype, then multiplied by the weight in the dtype. All tensors have
    one float dtype and contiguous rows. Raises ValueError for wrong shapes, dtypes or devices.
    """
    select("rms_norm", backend, x_TH.device, rms_norm_ref, _launch)(x_TH, weight_H, epsilon, out_TH)


def add_rms_norm(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    epsilon: float,
    out_TH: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> None:
    """residual += x (rounded to the dtype), out = rms_norm(residual), both in place; out may be x.

    Raises ValueError for wrong shapes, dtypes or devices.
    """
    run = select("add_rms_norm", backend, x_TH.device, add_rms_norm_ref, _launch_add)
    run(x_TH, residual_TH, weight_H, epsilon, out_TH)


def _check(x_TH: torch.Tensor, residual_TH: torch.Tensor | None, weight_H: torch.Tensor, out_TH: torch.Tensor) -> None:
    check_floats(x_TH=x_TH, weight_H=weight_H, out_TH=out_TH)
    check_shape("out_TH", out_TH, *x_TH.shape)
    check_shape("weight_H", weight_H, x_TH.shape[1])
    if residual_TH is not None:
        check_floats(x_TH=x_TH, residual_TH=residual_TH)
        check_shape("residual_TH", residual_TH, *x_TH.shape)


@triton.jit
@no_type_check
def _rms_norm_kernel(
    x_pointer,
    residual_pointer,
    weight_pointer,
    out_pointer,
    x_stride,
    residual_stride,
    out_stride,
    num_values,
    epsilon,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    dtype = out_pointer.dtype.element_ty
    x = tl.load(x_pointer + t * x_stride + h, mask=h < num_values, other=0.0).to(tl.float32)
    if residual_pointer is not None:
        residual = tl.load(residual_pointer + t * residual_stride + h, mask=h < num_values, other=0.0)
        total = (x + residual.to(tl.float32)).to(dtype)
        tl.store(residual_pointer + t * residual_stride + h, total, mask=h < num_values)
        x = total.to(tl.float32)
    normalised = x * tl.rsqrt(tl.sum(x * x, axis=0) / num_values + epsilon)
    weight = tl.load(weight_pointer + h, mask=h < num_values, other=0.0).to(tl.float32)
    # the product of two half-precision values is exact in float32, so this rounds once, as a product in the dtype does
    out = weight * normalised.to(dtype).to(tl.float32)
    tl.store(out_pointer + t * out_stride + h, out.to(dtype), mask=h < num_values)


def _launch(x_TH: torch.Tensor, weight_H: torch.Tensor, epsilon: float, out_TH: torch.Tensor) -> None:
    _launch_add(x_TH, None, weight_H, epsilon, out_TH)


def _launch_add(
    x_TH: torch.Tensor, residual_TH: torch.Tensor | None, weight_H: torch.Tensor, epsilon: float, out_TH: torch.Tensor
) -> None:
    _check(x_TH, residual_TH, weight_H, out_TH)
    num_tokens, num_values = x_TH.shape
    if num_tokens == 0:
        return
    block = triton.next_power_of_2(num_values)
    _rms_norm_kernel[(num_tokens,)](
        x_TH,
        residual_TH,
        weight_H,
        out_TH,
        x_TH.stride(0),
        0 if residual_TH is None else residual_TH.stride(0),
        out_TH.stride(0),
        num_values,
        epsilon,
        BLOCK_H=block,
        num_warps=min(16, max(4, block // 512)),
        enable_fp_fusion=True,
    )
