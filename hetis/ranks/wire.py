"""The layout of link messages. Sizes follow from the step alone, so both ends compute them and no header is sent.

Request (primary to worker), per layer:  qkv_UHD of the decode lanes, kv_A2D of prompt tokens to keep, pages_N12SD.
Reply (worker to primary), per layer:    out_UMD, lse2_UM in float32, pages_N12SD.

The pages belong to lanes on the move (`hauling.py`). They begin at a multiple of 16 bytes, which is what kernels load
at once and are compiled for. What would be empty is not sent at all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_ALIGNMENT = 16  # bytes


@dataclass(frozen=True, slots=True)
class WireFormat:
    """Shapes of one model: M query heads per group, head_dim D, page size S, element type."""

    num_queries: int
    head_dim: int
    page_size: int
    dtype: torch.dtype

    @property
    def decode_width(self) -> int:
        """Elements of one decode lane in a request: M queries, key, value."""
        return (self.num_queries + 2) * self.head_dim

    @property
    def prefill_width(self) -> int:
        """Elements of one prompt token of one lane: key, value."""
        return 2 * self.head_dim

    @property
    def out_width(self) -> int:
        return self.num_queries * self.head_dim

    @property
    def page_width(self) -> int:
        """Elements of one page in one layer: keys, values."""
        return 2 * self.page_size * self.head_dim

    def request_bytes(self, num_decode: int, num_prefill: int, num_pages: int) -> int:
        values = num_decode * self.decode_width + num_prefill * self.prefill_width
        return self._with_pages(values * self.dtype.itemsize, num_pages)

    def reply_bytes(self, num_decode: int, num_pages: int) -> int:
        values = num_decode * self.out_width
        return self._with_pages(values * self.dtype.itemsize + num_decode * self.num_queries * 4, num_pages)

    def _with_pages(self, num_bytes: int, num_pages: int) -> int:
        if num_pages == 0:
            return num_bytes
        return _aligned(num_bytes) + num_pages * self.page_width * self.dtype.itemsize

    def request_views(
        self, message: Tensor, num_decode: int, num_prefill: int, num_pages: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(qkv_UF, kv_AF, pages_N12SD) inside a request's bytes."""
        decode, prefill = num_decode * self.decode_width, num_prefill * self.prefill_width
        pages = _aligned((decode + prefill) * self.dtype.itemsize) // self.dtype.itemsize
        values = message.view(self.dtype)
        return (
            values[:decode].view(num_decode, self.decode_width),
            values[decode : decode + prefill].view(num_prefill, self.prefill_width),
            self._pages(values[pages:], num_pages),
        )

    def reply_views(self, message: Tensor, num_decode: int, num_pages: int) -> tuple[Tensor, Tensor, Tensor]:
        """(out_UMD, lse2_UM, pages_N12SD) inside a reply's bytes."""
        out = num_decode * self.out_width * self.dtype.itemsize
        lse2 = out + num_decode * self.num_queries * 4
        return (
            message[:out].view(self.dtype).view(num_decode, self.num_queries, self.head_dim),
            message[out:lse2].view(torch.float32).view(num_decode, self.num_queries),
            self._pages(message[_aligned(lse2) :].view(self.dtype), num_pages),
        )

    def _pages(self, values: Tensor, num_pages: int) -> Tensor:
        return values.view(num_pages, 1, 2, self.page_size, self.head_dim)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
