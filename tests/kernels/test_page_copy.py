"""Whole pages of all layers to and from a contiguous buffer."""

import pytest
import torch

from hetis_kernels.page_copy import page_gather, page_scatter


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("page_size", "head_dim", "num_pages"), [(16, 80, 1), (1, 64, 4), (32, 128, 3)])
def test_pages_move_between_pools_bit_for_bit(
    device: torch.device, dtype: torch.dtype, backend: str, page_size: int, head_dim: int, num_pages: int
) -> None:
    source = torch.randn(3, 2, 7, page_size, head_dim).to(dtype)
    source[:, :, :, page_size // 2 :] = torch.nan  # unused offsets travel as they are
    source = source.to(device)
    here = torch.randperm(7)[:num_pages].int().to(device)
    there = torch.randperm(5)[:num_pages].int().to(device)
    buffer = torch.empty(num_pages, 3, 2, page_size, head_dim, dtype=dtype, device=device)
    page_gather(source, here, buffer, backend=backend)
    target = torch.zeros(3, 2, 5, page_size, head_dim, dtype=dtype, device=device)
    expected = target.clone()
    page_scatter(buffer, there, target, backend=backend)
    for page, new_page in zip(here.tolist(), there.tolist(), strict=True):
        expected[:, :, new_page] = source[:, :, page]
    torch.testing.assert_close(target, expected, rtol=0, atol=0, equal_nan=True)


def test_arguments_are_checked() -> None:
    pool, page = torch.zeros(1, 2, 3, 4, 64), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="page buffer has shape"):
        page_gather(pool, page, torch.zeros(2, 1, 2, 4, 64), backend="reference")
    with pytest.raises(ValueError, match="not contiguous"):
        page_scatter(
            torch.zeros(1, 1, 2, 4, 64), page, torch.zeros(1, 2, 4, 3, 64).transpose(2, 3), backend="reference"
        )
