"""Appending keys and values to their cells."""

import pytest
import torch

from hetis_kernels.kv_append import kv_append


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("head_dim", "num_pairs"), [(64, 1), (80, 8), (128, 21)])
def test_cells_hold_their_tokens_and_no_other_cell_changes(
    device: torch.device, dtype: torch.dtype, backend: str, head_dim: int, num_pairs: int
) -> None:
    num_pages, page_size = 9, 4
    pool = torch.full((3, 2, num_pages, page_size, head_dim), torch.nan, dtype=dtype, device=device)
    qkv = torch.randn(num_pairs + 3, 5, head_dim, device=device).to(dtype)
    k_ND, v_ND = qkv[:, 3], qkv[:, 4]
    qkv_A = torch.randperm(num_pairs + 3)[:num_pairs].int().to(device)
    cell_A = torch.randperm(num_pages * page_size)[:num_pairs].to(device)
    expected = pool.clone()
    for pair, cell in zip(qkv_A.tolist(), cell_A.tolist(), strict=True):
        expected[1, 0, cell // page_size, cell % page_size] = k_ND[pair]
        expected[1, 1, cell // page_size, cell % page_size] = v_ND[pair]
    kv_append(k_ND, v_ND, pool[1], qkv_A, cell_A, backend=backend)
    torch.testing.assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_append_changes_nothing(device: torch.device) -> None:
    pool = torch.zeros(2, 3, 4, 64, device=device)
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    kv_append(pool[0, 0], pool[1, 0], pool, nothing, nothing.long(), backend="triton")
    assert (pool == 0).all()


def test_arguments_are_checked() -> None:
    pool, vectors = torch.zeros(2, 3, 4, 64), torch.zeros(2, 64)
    index = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cell_A is torch\.int32"):
        kv_append(vectors, vectors, pool, index, index, backend="reference")
    with pytest.raises(ValueError, match=r"v_ND is torch\.float16"):
        kv_append(vectors, vectors.half(), pool, index, index.long(), backend="reference")
    with pytest.raises(ValueError, match="not contiguous over pages"):
        kv_append(vectors, vectors, pool.transpose(1, 2), index, index.long(), backend="reference")
