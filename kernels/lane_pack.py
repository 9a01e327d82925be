"""Gathers chosen rows into one contiguous message and scatters a message back to its rows.

U rows of the message, N rows of the tensor at the other side, F values per row.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .dispatch import Backend, check_floats, check_indices, check_shape, select


def lane_pack_ref(source_NF: torch.Tensor, row_U: torch.Tensor, out_UF: torch.Tensor) -> None:
    """The formula of `lane_pack` as one indexed read."""
    _check(source_NF, row_U, out_UF, "out_UF")
    out_UF.copy_(source_NF[row_U.long()])


def lane_unpack_ref(source_UF: torch.Tensor, row_U: torch.Tensor, out_NF: torch.Tensor) -> None:
    """The formula of `lane_unpack` as one indexed write."""
    _check(out_NF, row_U, source_UF, "source_UF")
    out_NF[row_U.long()] = source_UF


def lane_pack(source_NF: torch.Tensor, row_U: torch.Tensor, out_UF: torch.Tensor, *, backend: Backend = "auto") -> None:
    """out_UF[u] = source_NF[row_U[u]], in place.

    source_NF, out_UF: one float dtype, rows contiguous, any row stride. row_U: int32. Raises ValueError for wrong
    shapes, dtypes or devices.
    """
    select("lane_pack", backend, source_NF.device, lane_pack_ref, _launch_pack)(source_NF, row_U, out_UF)


def lane_unpack(
    source_UF: torch.Tensor, row_U: torch.Tensor, out_NF: torch.Tensor, *, backend: Backend = "auto"
) -> None:
    """out_NF[row_U[u]] = source_UF[u], in place; other rows stay untouched.

    source_UF, out_NF: one float dtype, rows contiguous, any row stride. row_U: int32, no row twice. Raises ValueError
    for wrong shapes, dtypes or devices.
    """
    select("lane_unpack", backend, source_UF.device, lane_unpack_ref, _launch_unpack)(source_UF, row_U, out_NF)


def _check(rows_NF: torch.Tensor, row_U: torch.Tensor, message_UF: torch.Tensor, message_name: str) -> None:
    check_floats(rows_NF=rows_NF, **{message_name: message_UF})
    check_indices(torch.int32, rows_NF.device, row_U=row_U)
    check_shape(message_name, message_UF, row_U.shape[0], rows_NF.shape[1])


@triton.jit
@no_type_check
def _lane_pack_kernel(
    source_pointer,
    row_pointer,
    out_pointer,
    num_values,
    source_stride,
    out_stride,
    SCATTER: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    u = tl.program_id(0).to(tl.int64)
    row = tl.load(row_pointer + u).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if SCATTER:
        source_row, out_row = u, row
    else:
        source_row, out_row = row, u
    values = tl.load(source_pointer + source_row * source_stride + f, mask=f < num_values)
    tl.store(out_pointer + out_row * out_stride + f, values, mask=f < num_values)


def _launch_pack(source_NF: torch.Tensor, row_U: torch.Tensor, out_UF: torch.Tensor) -> None:
    _check(source_NF, row_U, out_UF, "out_UF")
    _launch(source_NF, row_U, out_UF, scatter=False)


def _launch_unpack(source_UF: torch.Tensor, row_U: torch.Tensor, out_NF: torch.Tensor) -> None:
    _check(out_NF, row_U, source_UF, "source_UF")
    _launch(source_UF, row_U, out_NF, scatter=True)


def _launch(source_NF: torch.Tensor, row_U: torch.Tensor, out_UF: torch.Tensor, *, scatter: bool) -> None:
    num_rows, num_values = row_U.shape[0], source_NF.shape[1]
    if num_rows == 0:
        return
    block = min(1024, triton.next_power_of_2(num_values))
    _lane_pack_kernel[(num_rows, triton.cdiv(num_values, block))](
        source_NF,
        row_U,
        out_UF,
        num_values,
        source_NF.stride(0),
        out_UF.stride(0),
        SCATTER=scatter,
        BLOCK_F=block,
        enable_fp_fusion=True,
    )
