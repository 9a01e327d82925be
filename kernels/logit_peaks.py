"""The largest logit of every block of a vocabulary, and whether all logits are finite, in one pass.

R rows, V vocabulary, N blocks of BLOCK tokens, the last one possibly shorter.
"""

import torch
from torch.nn import functional

from .dispatch import Backend, check_floats, select

BLOCK = 64


def logit_peaks_ref(logits_RV: torch.Tensor, peak_RN: torch.Tensor, finite_RN: torch.Tensor) -> None:
    """The formula of `logit_peaks`, for every device."""
    check_floats(logits_RV=logits_RV)
    beyond = -logits_RV.shape[1] % BLOCK
    shape = (*peak_RN.shape, BLOCK)
    peak_RN.copy_(functional.pad(logits_RV, (0, beyond), value=-torch.inf).view(shape).amax(-1))
    finite_RN.copy_(functional.pad(torch.isfinite(logits_RV), (0, beyond), value=True).view(shape).all(-1))


def logit_peaks(logits_RV: torch.Tensor, *, backend: Backend = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """(peak float32 [R, N], finite bool [R, N]) of logits in any float dtype with contiguous rows.

    A block with a NaN has the peak NaN and is not finite. Raises ValueError for other shapes, dtypes or devices.
    """
    num_rows, size = logits_RV.shape
    peak_RN = torch.empty(num_rows, -(-size // BLOCK), dtype=torch.float32, device=logits_RV.device)
    finite_RN = torch.empty_like(peak_RN, dtype=torch.bool)
    run = select("logit_peaks", backend, logits_RV.device, logit_peaks_ref, logit_peaks_ref)
    run(logits_RV, peak_RN, finite_RN)
    return peak_RN, finite_RN
