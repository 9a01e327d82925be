"""Appending K and V rows to their slots."""

import pytest
import torch

from hetis_kernels.kv_append import kv_append


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("head_dim", "num_rows"), [(64, 1), (80, 8), (128, 21)])
def test_slots_hold_their_rows_and_nothing_else_changes(
    device: torch.device, dtype: torch.dtype, backend: str, head_dim: int, num_rows: int
) -> None:
    num_pages, page_size = 9, 4
    pool = torch.full((3, 2, num_pages, page_size, head_dim), torch.nan, dtype=dtype, device=device)
    qkv = torch.randn(num_rows + 3, 5, head_dim, device=device).to(dtype)
    k_ND, v_ND = qkv[:, 3], qkv[:, 4]
    row_A = torch.randperm(num_rows + 3)[:num_rows].int().to(device)
    slot_A = torch.randperm(num_pages * page_size)[:num_rows].to(device)
    expected = pool.clone()
    for row, slot in zip(row_A.tolist(), slot_A.tolist(), strict=True):
        expected[1, 0, slot // page_size, slot % page_size] = k_ND[row]
        expected[1, 1, slot // page_size, slot % page_size] = v_ND[row]
    kv_append(k_ND, v_ND, pool[1], row_A, slot_A, backend=backend)
    torch.testing.assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)


def test_no_rows_are_no_work(device: torch.device) -> None:
    pool = torch.zeros(2, 3, 4, 64, device=device)
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    kv_append(pool[0, 0], pool[1, 0], pool, nothing, nothing.long(), backend="triton")
    assert (pool == 0).all()


def test_arguments_are_checked() -> None:
    pool, rows = torch.zeros(2, 3, 4, 64), torch.zeros(2, 64)
    index = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"slot_A is torch\.int32"):
        kv_append(rows, rows, pool, index, index, backend="reference")
    with pytest.raises(ValueError, match=r"v_ND is torch\.float16"):
        kv_append(rows, rows.half(), pool, index, index.long(), backend="reference")
    with pytest.raises(ValueError, match="not contiguous over pages"):
        kv_append(rows, rows, pool.transpose(1, 2), index, index.long(), backend="reference")
