"""Pages of one pool: which are free."""

import numpy as np
from numpy.typing import NDArray


class PageAllocator:
    """A stack of free page ids. Pages freed last are allocated first: those never used stay untouched."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self.peak = 0  # most pages ever in use
        # [0, num_free) is free, the top at the end; above it the ids mean nothing
        self._stack: NDArray[np.int32] = np.arange(num_pages, dtype=np.int32)[::-1].copy()

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    @property
    def free_pages(self) -> NDArray[np.int32]:
        return self._stack[: self.num_free].copy()

    def allocate(self, count: int) -> NDArray[np.int32]:
        """`count` page ids; unused ones in ascending order, so that the pages of a new lane lie side by side."""
        assert count <= self.num_free, f"{count} pages asked of {self.num_free} free ones"
        self.num_free -= count
        self.peak = max(self.peak, self.num_used)
        return self._stack[self.num_free : self.num_free + count][::-1].copy()

    def free(self, pages: NDArray[np.int32]) -> None:
        """Takes back page ids, in any shape."""
        assert self.num_free + pages.size <= self.num_pages, "more pages freed than were allocated"
        self._stack[self.num_free : self.num_free + pages.size] = pages.ravel()[::-1]
        self.num_free += pages.size
