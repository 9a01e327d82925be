"""Gathering vectors into a message, and scattering a message to the places of its vectors."""

import pytest
import torch

from hetis_kernels.lane_pack import lane_pack, lane_unpack


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("num_values", "num_vectors"), [(1, 3), (3 * 64, 1), (10 * 128, 5), (6 * 80, 7)])
def test_unpack_undoes_pack(
    device: torch.device, dtype: torch.dtype, backend: str, num_values: int, num_vectors: int
) -> None:
    wide = torch.full((9, num_values + 5), torch.nan, dtype=dtype, device=device)
    source_NF = wide[:, :num_values]  # the stride is not the number of values
    source_NF.copy_(torch.randn(9, num_values))
    qkv_U = torch.randperm(9)[:num_vectors].int().to(device)
    message = torch.empty(num_vectors, num_values, dtype=dtype, device=device)
    lane_pack(source_NF, qkv_U, message, backend=backend)
    assert torch.equal(message, torch.stack([source_NF[index] for index in qkv_U.tolist()]))

    target = torch.zeros_like(wide)
    lane_unpack(message, qkv_U, target[:, :num_values], backend=backend)
    for index in range(9):
        expected = source_NF[index] if index in qkv_U.tolist() else torch.zeros_like(source_NF[index])
        assert torch.equal(target[index, :num_values], expected)
    assert (target[:, num_values:] == 0).all()


def test_an_empty_message_changes_nothing(device: torch.device) -> None:
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    around = torch.full((2, 4), 5.0, device=device)  # a grid of no programs must not write beside its empty message
    lane_pack(torch.ones(3, 4, device=device), nothing, around[1:1], backend="triton")
    lane_unpack(around[1:1], nothing, around, backend="triton")
    assert (around == 5.0).all()


def test_arguments_are_checked() -> None:
    index = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="out_UF has shape"):
        lane_pack(torch.zeros(3, 4), index, torch.zeros(3, 4), backend="reference")
    with pytest.raises(ValueError, match="source_UF has shape"):
        lane_unpack(torch.zeros(2, 3), index, torch.zeros(3, 4), backend="reference")
    with pytest.raises(ValueError, match=r"qkv_U is torch\.int64"):
        lane_pack(torch.zeros(3, 4), index.long(), torch.zeros(2, 4), backend="reference")
