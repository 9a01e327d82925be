"""Gathering rows into a message and scattering a message to its rows."""

import pytest
import torch

from hetis_kernels.lane_pack import lane_pack, lane_unpack


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("num_values", "num_rows"), [(1, 3), (3 * 64, 1), (10 * 128, 5), (6 * 80, 7)])
def test_unpack_undoes_pack(
    device: torch.device, dtype: torch.dtype, backend: str, num_values: int, num_rows: int
) -> None:
    wide = torch.full((9, num_values + 5), torch.nan, dtype=dtype, device=device)
    source_NF = wide[:, :num_values]  # the row stride is not the number of values
    source_NF.copy_(torch.randn(9, num_values))
    row_U = torch.randperm(9)[:num_rows].int().to(device)
    message = torch.empty(num_rows, num_values, dtype=dtype, device=device)
    lane_pack(source_NF, row_U, message, backend=backend)
    assert torch.equal(message, torch.stack([source_NF[row] for row in row_U.tolist()]))

    target = torch.zeros_like(wide)
    lane_unpack(message, row_U, target[:, :num_values], backend=backend)
    for row in range(9):
        expected = source_NF[row] if row in row_U.tolist() else torch.zeros_like(source_NF[row])
        assert torch.equal(target[row, :num_values], expected)
    assert (target[:, num_values:] == 0).all()


def test_no_rows_are_no_work(device: torch.device) -> None:
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    around = torch.full((2, 4), 5.0, device=device)  # a grid of no programs must not write beside its empty message
    lane_pack(torch.ones(3, 4, device=device), nothing, around[1:1], backend="triton")
    lane_unpack(around[1:1], nothing, around, backend="triton")
    assert (around == 5.0).all()


def test_arguments_are_checked() -> None:
    row = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="out_UF has shape"):
        lane_pack(torch.zeros(3, 4), row, torch.zeros(3, 4), backend="reference")
    with pytest.raises(ValueError, match="source_UF has shape"):
        lane_unpack(torch.zeros(2, 3), row, torch.zeros(3, 4), backend="reference")
    with pytest.raises(ValueError, match=r"row_U is torch\.int64"):
        lane_pack(torch.zeros(3, 4), row.long(), torch.zeros(2, 4), backend="reference")
