"""Gathers chosen vectors into one contiguous message, and scatters a message back to its vectors.

U vectors of the message, N vectors of the other tensor, one for each (token, head group), F values per vector.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .dispatch import Backend, check_floats, check_indices, check_shape, select


def lane_pack_ref(source_NF: torch.Tensor, qkv_U: torch.Tensor, out_UF: torch.Tensor) -> None:
    """The formula of `lane_pack` as one indexed read."""
    _check(source_NF, qkv_U, out_UF, "out_UF")
    out_UF.copy_(source_NF[qkv_U.long()])


def lane_unpack_ref(source_UF: torch.Tensor, qkv_U: torch.Tensor, out_NF: torch.Tensor) -> None:
    """The formula of `lane_unpack` as one indexed write."""
    _check(out_NF, qkv_U, source_UF, "source_UF")
    out_NF[qkv_U.long()] = source_UF


def lane_pack(source_NF: torch.Tensor, qkv_U: torch.Tensor, out_UF: torch.Tensor, *, backend: Backend = "auto") -> None:
    """out_UF[u] = source_NF[qkv_U[u]], in place.

    source_NF, out_UF: one float dtype, vectors contiguous, at any stride. qkv_U: int32. Raises ValueError for wrong
    shapes, dtypes or devices.
    """
    select("lane_pack", backend, source_NF.device, lane_pack_ref, _launch_pack)(source_NF, qkv_U, out_UF)


def lane_unpack(
    source_UF: torch.Tensor, qkv_U: torch.Tensor, out_NF: torch.Tensor, *, backend: Backend = "auto"
) -> None:
    """out_NF[qkv_U[u]] = source_UF[u], in place; other vectors are not touched.

    source_UF, out_NF: one float dtype, vectors contiguous, at any stride. qkv_U: int32, no index twice. Raises
    ValueError for wrong shapes, dtypes or devices.
    """
    select("lane_unpack", backend, source_UF.device, lane_unpack_ref, _launch_unpack)(source_UF, qkv_U, out_NF)


def _check(vectors_NF: torch.Tensor, qkv_U: torch.Tensor, message_UF: torch.Tensor, message_name: str) -> None:
    check_floats(vectors_NF=vectors_NF, **{message_name: message_UF})
    check_indices(torch.int32, vectors_NF.device, qkv_U=qkv_U)
    check_shape(message_name, message_UF, qkv_U.shape[0], vectors_NF.shape[1])


@triton.jit
@no_type_check
def _lane_pack_kernel(
    source_pointer,
    qkv_pointer,
    out_pointer,
    num_values,
    source_stride,
    out_stride,
    SCATTER: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    u = tl.program_id(0).to(tl.int64)
    qkv = tl.load(qkv_pointer + u).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if SCATTER:
        source, out = u, qkv
    else:
        source, out = qkv, u
    values = tl.load(source_pointer + source * source_stride + f, mask=f < num_values)
    tl.store(out_pointer + out * out_stride + f, values, mask=f < num_values)


def _launch_pack(source_NF: torch.Tensor, qkv_U: torch.Tensor, out_UF: torch.Tensor) -> None:
    _check(source_NF, qkv_U, out_UF, "out_UF")
    _launch(source_NF, qkv_U, out_UF, scatter=False)


def _launch_unpack(source_UF: torch.Tensor, qkv_U: torch.Tensor, out_NF: torch.Tensor) -> None:
    _check(out_NF, qkv_U, source_UF, "source_UF")
    _launch(source_UF, qkv_U, out_NF, scatter=True)


def _launch(source_NF: torch.Tensor, qkv_U: torch.Tensor, out_UF: torch.Tensor, *, scatter: bool) -> None:
    num_vectors, num_values = qkv_U.shape[0], source_NF.shape[1]
    if num_vectors == 0:
        return
    block = min(1024, triton.next_power_of_2(num_values))
    _lane_pack_kernel[(num_vectors, triton.cdiv(num_values, block))](
        source_NF,
        qkv_U,
        out_UF,
        num_values,
        source_NF.stride(0),
        out_UF.stride(0),
        SCATTER=scatter,
        BLOCK_F=block,
        enable_fp_fusion=True,
    )
