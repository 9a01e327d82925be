"""Sums of integer weights over blocks of tokens.

R rows, K blocks, B tokens of a block.
"""

import torch

from .dispatch import Backend, check_shape, select


def weight_mass_ref(weight_RKB: torch.Tensor, mass_RK: torch.Tensor) -> None:
    """The formula of `weight_mass`, for every device."""
    check_shape("mass_RK", mass_RK, *weight_RKB.shape[:2])
    torch.sum(weight_RKB.to(torch.int64), dim=-1, out=mass_RK)


def weight_mass(weight_RKB: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """int64 [R, K]: sums over B of contiguous float32 weights from 0 to 2^40, each cut to an integer first.

    No 8 bytes are written for each weight, which on the CPU takes longer than to compute it. A row with a NaN has any
    sums. Raises ValueError for other shapes, dtypes or devices.
    """
    mass_RK = torch.empty(weight_RKB.shape[:2], dtype=torch.int64, device=weight_RKB.device)
    select("weight_mass", backend, weight_RKB.device, weight_mass_ref, weight_mass_ref)(weight_RKB, mass_RK)
    return mass_RK
