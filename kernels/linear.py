"""Linear layers: one call for every device.

Shapes: T tokens, N outputs, K inputs.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

_plain = False


@dataclass(frozen=True)
class PackedLinear:
    """The weight of one linear layer, in the form in which `linear` reads it.

    `weight` is [N, K], the very tensor that was given (no copy): an embedding and an LM head may be one tensor.
    """

    weight: Tensor
    bias: Tensor | None


def use_plain(plain: bool) -> None:
    """True: every `linear` of this process calls `torch.nn.functional.linear`; False (default): the fastest way."""
    global _plain
    _plain = plain


def pack_linear(weight_NK: Tensor, bias_N: Tensor | None = None) -> PackedLinear:
    """Check a weight [N, K] and its bias [N] and prepare them for `linear`; the weight's storage is shared.

    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    if weight_NK.dim() != 2:
        raise ValueError(f"linear weight has shape {tuple(weight_NK.shape)}; give a matrix [outputs, inputs]")
    if bias_N is not None and bias_N.shape != weight_NK.shape[:1]:
        raise ValueError(
            f"linear bias has shape {tuple(bias_N.shape)}; give one value for each of {weight_NK.shape[0]} outputs"
        )
    if bias_N is not None and (bias_N.dtype, bias_N.device) != (weight_NK.dtype, weight_NK.device):
        raise ValueError("linear bias and weight differ in dtype or device; convert one of them")
    return PackedLinear(weight_NK, bias_N)


def linear(x_TK: Tensor, packed: PackedLinear, out_TN: Tensor | None = None) -> Tensor:
    """y_TN = x_TK @ weight_NK.T + bias_N, into `out_TN` when given, else into a new tensor; returned either way.

    x_TK, the weight and the result have one dtype (float32, bfloat16 or float16); sums in float32, one rounding.
    """
    y_TN = functional.linear(x_TK, packed.weight, packed.bias)
    return y_TN if out_TN is None else out_TN.copy_(y_TN)
