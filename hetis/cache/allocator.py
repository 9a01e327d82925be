"""Pages of one pool: which are free."""

import numpy as np
from numpy.typing import NDArray


class PageAllocator:
    """A stack of free page ids. Pages freed last are taken first: they are warm, and untouched ones stay untouched."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self.peak = 0  # most pages ever in use
        # [0, num_free) is free, the top at the end; above it is rubbish
        self._stack: NDArray[np.int32] = np.arange(num_pages, dtype=np.int32)[::-1].copy()

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    @property
    def free_pages(self) -> NDArray[np.int32]:
        return self._stack[: self.num_free].copy()

    def take(self, count: int) -> NDArray[np.int32]:
        """`count` pages; fresh ones come in ascending order, so that a new lane lies in one piece."""
        assert count <= self.num_free, f"{count} pages asked of {self.num_free} free ones"
        self.num_free -= count
        self.peak = max(self.peak, self.num_used)
        return self._stack[self.num_free : self.num_free + count][::-1].copy()

    def give(self, pages: NDArray[np.int32]) -> None:
        """Back to the free ones."""
        assert self.num_free + pages.size <= self.num_pages, "more pages given back than were taken"
        self._stack[self.num_free : self.num_free + pages.size] = pages.ravel()[::-1]
        self.num_free += pages.size
