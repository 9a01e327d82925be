"""Linear layers: one call for every device.

On the CPU a kernel of this package computes them from weights packed in place: blocks of 32 rows, interleaved input by
input (`csrc/cpu/dense_linear.h`), which each thread reads as one stream, once per call: at the speed of a plain sum of
the same memory when tokens are few, at the speed of oneDNN's packed weights when they are many. Its result for a token
does not depend on other tokens, so decode and prefill are bit-identical. Elsewhere torch computes.

T tokens, N outputs, K inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .dispatch import check_floats, cpu_op

BLOCK_ROWS = 32


@dataclass(frozen=True)
class PackedLinear:
    """Linear layer, prepared for `linear`.

    weight: packed [N / 32, K / inputs of a step, 32, inputs of a step], or row-major [N, K] where torch computes. N or
    K may be 0: the result is empty, or the bias (else zeros). bias: [N] or None.
    """

    weight: Tensor
    bias: Tensor | None
    num_outputs: int
    num_inputs: int
    is_packed: bool


def empty_weight(num_outputs: int, num_inputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row-major weight [N, K] to be filled, whose memory `pack_linear` can pack in place: its rows are padded.

    Where the CPU kernel computes, the memory has whole blocks of rows and whole steps of inputs, with zeros after row N
    and input K.
    """
    if device.type != "cpu" or not _has_kernel():
        return torch.empty(num_outputs, num_inputs, dtype=dtype, device=device)
    blocks, steps, block_rows, step_inputs = packed_shape(num_outputs, num_inputs, dtype)
    padded = torch.empty(blocks * block_rows, steps * step_inputs, dtype=dtype)
    padded[num_outputs:].zero_()
    padded[:, num_inputs:].zero_()
    return padded[:num_outputs, :num_inputs]


def pack_linear(
    weight_NK: Tensor, bias_N: Tensor | None = None, *, plain: bool = False, in_place: bool = False
) -> PackedLinear:
    """Checks a weight [N, K] and its bias [N] and prepares them for `linear`; the bias is shared, not copied.

    `plain`: torch computes every call, and the weight is shared. Else, where the CPU kernel computes, the weight is
    copied, or, `in_place`, packed in its own memory, which `empty_weight` made and nothing may use any more.

    The weight must hold its values already: on the CPU its pages are gathered into huge pages, which costs 1 to 2 s per
    GB and raises bandwidth by a quarter; it is free if the allocator has done so (THP_MEM_ALLOC_ENABLE=1). Raises
    ValueError for shapes, dtypes or devices that do not fit together.
    """
    if weight_NK.dim() != 2:
        raise ValueError(f"linear weight has shape {tuple(weight_NK.shape)}; give a matrix [outputs, inputs]")
    if bias_N is not None and bias_N.shape != weight_NK.shape[:1]:
        raise ValueError(f"linear bias has shape {tuple(bias_N.shape)}; give one value for each row of the weight")
    if bias_N is not None and (bias_N.dtype, bias_N.device) != (weight_NK.dtype, weight_NK.device):
        raise ValueError("linear bias and weight differ in dtype or device; convert one of them")
    check_floats(weight_NK=weight_NK)
    num_outputs, num_inputs = weight_NK.shape
    on_cpu = weight_NK.device.type == "cpu"
    is_packed = on_cpu and not plain and _has_kernel()
    if is_packed and not in_place:
        source_NK = weight_NK
        weight_NK = empty_weight(num_outputs, num_inputs, source_NK.dtype, source_NK.device)
        weight_NK.copy_(source_NK)
    if on_cpu and cpu_op("advise_huge_pages") is not None:
        torch.ops.hetis.advise_huge_pages(weight_NK, True)
    weight = _pack(weight_NK) if is_packed else weight_NK
    return PackedLinear(weight, bias_N, num_outputs, num_inputs, is_packed)


def linear(x_TK: Tensor, packed: PackedLinear, out_TN: Tensor | None = None) -> Tensor:
    """y_TN = x_TK weight_NK^T + bias_N, into `out_TN` when given, else into a new tensor; returned either way.

    x, weight and result have one dtype and contiguous rows (any row stride); sums in float32, rounded once. `out_TN`
    must not overlap x. Raises ValueError or torch's RuntimeError for shapes or dtypes that do not fit.
    """
    if not packed.is_packed:
        return _torch_linear(x_TK, packed, out_TN)
    if out_TN is None:
        out_TN = x_TK.new_empty(x_TK.shape[0], packed.num_outputs)
    torch.ops.hetis.linear.default(x_TK, packed.weight, packed.bias, out_TN)
    return out_TN


def weight_rows(packed: PackedLinear, row_T: Tensor, out_TK: Tensor) -> None:
    """out[t] = row `row_T[t]` (int64 [T], below N) of the weight: an embedding that is also the LM head."""
    if packed.is_packed:
        torch.ops.hetis.linear_rows.default(packed.weight, packed.num_outputs, row_T, out_TK)
    else:
        torch.index_select(packed.weight, 0, row_T, out=out_TK)


def packed_shape(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Blocks, steps, rows of a block and inputs of a step of a packed weight [N, K] (`csrc/cpu/dense_linear.h`)."""
    step_inputs = 2 if dtype == torch.bfloat16 else 1
    return -(-num_outputs // BLOCK_ROWS), -(-num_inputs // step_inputs), BLOCK_ROWS, step_inputs


def _pack(weight_NK: Tensor) -> Tensor:
    """Packs a weight that `empty_weight` made, in its memory."""
    num_outputs, num_inputs = weight_NK.shape
    blocks, steps, block_rows, step_inputs = packed_shape(num_outputs, num_inputs, weight_NK.dtype)
    width = steps * step_inputs
    strides = (block_rows * width, block_rows * step_inputs, step_inputs, 1)
    padded_bytes = blocks * block_rows * width * weight_NK.itemsize
    is_padded = weight_NK.untyped_storage().nbytes() == padded_bytes and weight_NK.storage_offset() == 0
    if not is_padded or (weight_NK.numel() > 0 and weight_NK.stride() != (width, 1)):
        raise ValueError("linear weight has no memory for whole blocks of rows; make it by empty_weight")
    weight = weight_NK.as_strided((blocks, steps, block_rows, step_inputs), strides)
    torch.ops.hetis.linear_pack(weight)
    return weight


def _torch_linear(x_TK: Tensor, packed: PackedLinear, out_TN: Tensor | None) -> Tensor:
    if out_TN is None:
        return functional.linear(x_TK, packed.weight, packed.bias)
    if packed.bias is None:
        return torch.mm(x_TK, packed.weight.t(), out=out_TN)
    return torch.addmm(packed.bias, x_TK, packed.weight.t(), out=out_TN)


def _has_kernel() -> bool:
    """Whether the CPU kernel computes: not without the extension or AVX2."""
    return cpu_op("linear") is not None and bool(torch.ops.hetis.linear_has_kernel())
