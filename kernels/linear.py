"""Linear layers: one call for every device.

On the CPU a kernel of this package reads the weight as the checkpoint holds it (row-major, not packed, not copied):
once per call at memory bandwidth when tokens are few, at the speed of oneDNN's packed weights when they are many. Its
result for a token does not depend on other tokens, so decode and prefill are bit-identical. Elsewhere torch computes.

T tokens, N outputs, K inputs.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from .dispatch import check_floats, cpu_op


@dataclass(frozen=True)
class PackedLinear:
    """Linear layer, prepared for `linear`.

    weight: [N, K], the given tensor and not a copy, so that an embedding and an LM head may be one tensor. N or K may
    be 0: the result is empty, or the bias (else zeros). bias: [N] or None. kernel_tokens: calls of up to so many tokens
    run the CPU kernel, larger ones torch; 0: torch only.
    """

    weight: Tensor
    bias: Tensor | None
    kernel_tokens: int


def pack_linear(weight_NK: Tensor, bias_N: Tensor | None = None, *, plain: bool = False) -> PackedLinear:
    """Checks a weight [N, K] and its bias [N] and prepares them for `linear`; both are shared, not copied.

    `plain`: torch computes every call.

    The weight may be a slice of a larger one and must hold its values already: on the CPU its pages are gathered into
    huge pages, which costs 1 to 2 s per GB and raises bandwidth by a quarter; it is free if the allocator has done so
    (THP_MEM_ALLOC_ENABLE=1). Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    if weight_NK.dim() != 2:
        raise ValueError(f"linear weight has shape {tuple(weight_NK.shape)}; give a matrix [outputs, inputs]")
    if bias_N is not None and bias_N.shape != weight_NK.shape[:1]:
        raise ValueError(f"linear bias has shape {tuple(bias_N.shape)}; give one value for each row of the weight")
    if bias_N is not None and (bias_N.dtype, bias_N.device) != (weight_NK.dtype, weight_NK.device):
        raise ValueError("linear bias and weight differ in dtype or device; convert one of them")
    check_floats(weight_NK=weight_NK)
    on_cpu = weight_NK.device.type == "cpu"
    if on_cpu and cpu_op("advise_huge_pages") is not None:
        torch.ops.hetis.advise_huge_pages(weight_NK, True)
    has_kernel = on_cpu and not plain and weight_NK.numel() > 0
    return PackedLinear(weight_NK, bias_N, kernel_tokens(weight_NK.dtype) if has_kernel else 0)


def linear(x_TK: Tensor, packed: PackedLinear, out_TN: Tensor | None = None) -> Tensor:
    """y_TN = x_TK weight_NK^T + bias_N, into `out_TN` when given, else into a new tensor; returned either way.

    x, weight and result have one dtype and contiguous rows (any row stride); sums in float32, rounded once. `out_TN`
    must not overlap x. Raises ValueError or torch's RuntimeError for shapes or dtypes that do not fit.
    """
    if x_TK.shape[0] > packed.kernel_tokens or packed.kernel_tokens == 0:
        return _torch_linear(x_TK, packed, out_TN)
    if out_TN is None:
        out_TN = x_TK.new_empty(x_TK.shape[0], packed.weight.shape[0])
    torch.ops.hetis.linear.default(x_TK, packed.weight, packed.bias, out_TN)
    return out_TN


def _torch_linear(x_TK: Tensor, packed: PackedLinear, out_TN: Tensor | None) -> Tensor:
    if out_TN is None:
        return functional.linear(x_TK, packed.weight, packed.bias)
    if packed.bias is None:
        return torch.mm(x_TK, packed.weight.t(), out=out_TN)
    return torch.addmm(packed.bias, x_TK, packed.weight.t(), out=out_TN)


@cache
def kernel_tokens(dtype: torch.dtype) -> int:
    """Largest T for which the CPU kernel is faster than torch; 0 without the extension or AVX2."""
    if cpu_op("linear") is None:
        return 0
    return int(torch.ops.hetis.linear_max_tokens(dtype))
