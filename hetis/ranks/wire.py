"""The layout of link messages. Sizes follow from the step alone, so both ends compute them and no header is sent.

Request (primary to worker), per layer:  qkv_UHD of the decode lanes, kv_A2D of prompt tokens to append.
Reply (worker to primary), per layer:    out_UMD of the decode lanes.

What would be empty is not sent at all. Pages of migrating lanes are messages of their own (`page_transfer.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WireFormat:
    """Shapes of one model: M query heads per group, head_dim D, element type."""

    num_queries: int
    head_dim: int
    dtype: torch.dtype

    @property
    def decode_width(self) -> int:
        """Elements of one decode lane in a request: M queries, key, value."""
        return (self.num_queries + 2) * self.head_dim

    @property
    def prefill_width(self) -> int:
        """Elements of one prompt token of one lane in a request: key, value."""
        return 2 * self.head_dim

    @property
    def out_width(self) -> int:
        """Elements of one decode lane in a reply."""
        return self.num_queries * self.head_dim

    def request_bytes(self, num_decode: int, num_prefill: int) -> int:
        return (num_decode * self.decode_width + num_prefill * self.prefill_width) * self.dtype.itemsize

    def reply_bytes(self, num_decode: int) -> int:
        return num_decode * self.out_width * self.dtype.itemsize

    def request_views(self, message: Tensor, num_decode: int, num_prefill: int) -> tuple[Tensor, Tensor]:
        """(qkv_UHD, kv_A2D) inside a request's bytes."""
        values, decode = message.view(self.dtype), num_decode * self.decode_width
        return (
            values[:decode].view(num_decode, self.num_queries + 2, self.head_dim),
            values[decode:].view(num_prefill, 2, self.head_dim),
        )

    def reply_view(self, message: Tensor, num_decode: int) -> Tensor:
        """out_UMD inside a reply's bytes."""
        return message.view(self.dtype).view(num_decode, self.num_queries, self.head_dim)
