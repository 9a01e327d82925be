"""Copies whole pages of all layers between the pool and a contiguous buffer: the payload of a migration.

N pages of the buffer, L layers, P pages of the pool, S tokens per page, D head_dim.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .dispatch import Backend, check_floats, check_indices, check_shape, select


def page_gather_ref(pool_L2PSD: torch.Tensor, page_N: torch.Tensor, out_NL2SD: torch.Tensor) -> None:
    """The formula of `page_gather` as one indexed read."""
    _check(pool_L2PSD, page_N, out_NL2SD)
    out_NL2SD.copy_(pool_L2PSD[:, :, page_N.long()].permute(2, 0, 1, 3, 4))


def page_scatter_ref(source_NL2SD: torch.Tensor, page_N: torch.Tensor, pool_L2PSD: torch.Tensor) -> None:
    """The formula of `page_scatter` as one indexed write."""
    _check(pool_L2PSD, page_N, source_NL2SD)
    pool_L2PSD[:, :, page_N.long()] = source_NL2SD.permute(1, 2, 0, 3, 4)


def page_gather(
    pool_L2PSD: torch.Tensor, page_N: torch.Tensor, out_NL2SD: torch.Tensor, *, backend: Backend = "auto"
) -> None:
    """out_NL2SD[n, l, kv] = pool_L2PSD[l, kv, page_N[n]], in place.

    pool_L2PSD: contiguous. page_N: int32. out_NL2SD: contiguous, same dtype and device. Raises ValueError otherwise.
    """
    select("page_gather", backend, pool_L2PSD.device, page_gather_ref, _launch_gather)(pool_L2PSD, page_N, out_NL2SD)


def page_scatter(
    source_NL2SD: torch.Tensor, page_N: torch.Tensor, pool_L2PSD: torch.Tensor, *, backend: Backend = "auto"
) -> None:
    """pool_L2PSD[l, kv, page_N[n]] = source_NL2SD[n, l, kv], in place; no page twice.

    source_NL2SD: contiguous. page_N: int32. pool_L2PSD: contiguous, same dtype and device. Raises ValueError otherwise.
    """
    run = select("page_scatter", backend, pool_L2PSD.device, page_scatter_ref, _launch_scatter)
    run(source_NL2SD, page_N, pool_L2PSD)


def _check(pool_L2PSD: torch.Tensor, page_N: torch.Tensor, buffer_NL2SD: torch.Tensor) -> None:
    num_layers, two, _, page_size, head_dim = pool_L2PSD.shape
    check_floats(pool_L2PSD=pool_L2PSD, buffer_NL2SD=buffer_NL2SD)
    check_indices(torch.int32, pool_L2PSD.device, page_N=page_N)
    check_shape("the page buffer", buffer_NL2SD, page_N.shape[0], num_layers, two, page_size, head_dim)
    if not (pool_L2PSD.is_contiguous() and buffer_NL2SD.is_contiguous()):
        raise ValueError("the pool or the page buffer is not contiguous; pass whole tensors")


@triton.jit
@no_type_check
def _page_copy_kernel(
    pool_pointer,
    page_pointer,
    buffer_pointer,
    num_pages,
    num_values,
    SCATTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    plane = tl.program_id(1).to(tl.int64)  # K or V of one layer
    page = tl.load(page_pointer + n).to(tl.int64)
    value = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    in_pool = pool_pointer + (plane * num_pages + page) * num_values + value
    in_buffer = buffer_pointer + (n * tl.num_programs(1) + plane) * num_values + value
    if SCATTER:
        tl.store(in_pool, tl.load(in_buffer, mask=value < num_values), mask=value < num_values)
    else:
        tl.store(in_buffer, tl.load(in_pool, mask=value < num_values), mask=value < num_values)


def _launch_gather(
    pool_L2PSD: torch.Tensor, page_N: torch.Tensor, buffer_NL2SD: torch.Tensor, scatter: bool = False
) -> None:
    _check(pool_L2PSD, page_N, buffer_NL2SD)
    num_layers, _, num_pages, page_size, head_dim = pool_L2PSD.shape
    num_values = page_size * head_dim
    if page_N.shape[0] == 0:
        return
    block = min(2048, triton.next_power_of_2(num_values))
    _page_copy_kernel[(page_N.shape[0], 2 * num_layers, triton.cdiv(num_values, block))](
        pool_L2PSD, page_N, buffer_NL2SD, num_pages, num_values, SCATTER=scatter, BLOCK=block, enable_fp_fusion=True
    )


def _launch_scatter(source_NL2SD: torch.Tensor, page_N: torch.Tensor, pool_L2PSD: torch.Tensor) -> None:
    _launch_gather(pool_L2PSD, page_N, source_NL2SD, scatter=True)
