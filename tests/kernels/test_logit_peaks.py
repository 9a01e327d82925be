"""Peaks of blocks and finiteness against loops over Python floats."""

import math

import pytest
import torch

from hetis_kernels.logit_peaks import BLOCK, logit_peaks


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 640, 1000])
def test_peaks_and_finiteness_are_those_of_a_loop(
    device: torch.device, dtype: torch.dtype, backend: str, size: int
) -> None:
    logits = (torch.randn(9, size + 3) * 4).to(dtype)[:, :size]  # rows do not follow each other
    logits[0] = -torch.inf
    logits[1, size // 2] = torch.inf
    logits[2, -1] = torch.nan
    logits[3, 0] = -torch.tensor(torch.nan)
    logits[4], logits[4, 0] = -0.0, 0.0
    logits[5], logits[6] = torch.finfo(dtype).max, torch.finfo(dtype).min
    logits[7, size // 2] = -torch.inf
    peak_RN, finite_RN = logit_peaks(logits.to(device), backend=backend)
    assert peak_RN.dtype == torch.float32
    for row, values in enumerate(logits.tolist()):
        blocks = [values[first : first + BLOCK] for first in range(0, size, BLOCK)]
        assert finite_RN[row].tolist() == [all(map(math.isfinite, block)) for block in blocks]
        for found, block in zip(peak_RN[row].tolist(), blocks, strict=True):
            assert math.isnan(found) if any(map(math.isnan, block)) else found == max(block)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_no_rows_are_possible(device: torch.device, backend: str) -> None:
    peak_RN, finite_RN = logit_peaks(torch.zeros(0, 100, device=device), backend=backend)
    assert peak_RN.shape == finite_RN.shape == (0, 2)


def test_other_dtypes_are_refused(device: torch.device) -> None:
    for backend in ("reference", "auto"):
        with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
            logit_peaks(torch.zeros(2, 100, dtype=torch.float64, device=device), backend=backend)
