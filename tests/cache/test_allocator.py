"""The free pages of one pool."""

import numpy as np
import pytest

from hetis.cache.allocator import PageAllocator


def test_fresh_pages_ascend_and_freed_ones_come_first() -> None:
    pages = PageAllocator(6)
    assert pages.allocate(3).tolist() == [0, 1, 2]
    pages.free(np.array([[1], [0]], dtype=np.int32))
    assert pages.allocate(3).tolist() == [1, 0, 3]
    assert sorted(pages.free_pages.tolist()) == [4, 5]


def test_counts() -> None:
    pages = PageAllocator(5)
    allocated = pages.allocate(4)
    pages.free(allocated[:3])
    pages.allocate(1)
    assert (pages.num_free, pages.num_used, pages.peak) == (3, 2, 4)


def test_too_many_pages_are_refused() -> None:
    pages = PageAllocator(2)
    with pytest.raises(AssertionError, match="3 pages asked of 2"):
        pages.allocate(3)
    with pytest.raises(AssertionError, match="more pages freed"):
        pages.free(np.array([0], dtype=np.int32))
    assert PageAllocator(0).allocate(0).size == 0
