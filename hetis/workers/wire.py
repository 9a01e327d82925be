"""The layout of link messages. Sizes follow from the step alone, so both ends compute them and no header is sent.

Request (primary to worker), per layer:  qkv_UHD of the decode lanes, then kv_A2D of prompt tokens to keep.
Reply (worker to primary), per layer:    out_UMD, then lse2_UM in float32. No decode lanes: no reply.
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
        """Elements of one prompt token of one lane: key, value."""
        return 2 * self.head_dim

    @property
    def out_width(self) -> int:
        return self.num_queries * self.head_dim

    def request_bytes(self, num_decode: int, num_prefill: int) -> int:
        return (num_decode * self.decode_width + num_prefill * self.prefill_width) * self.dtype.itemsize

    def reply_bytes(self, num_decode: int) -> int:
        return num_decode * (self.out_width * self.dtype.itemsize + self.num_queries * 4)

    def request_views(self, message: Tensor, num_decode: int, num_prefill: int) -> tuple[Tensor, Tensor]:
        """(qkv_UF, kv_AF) inside a request's bytes."""
        values = message.view(self.dtype)
        border = num_decode * self.decode_width
        return (
            values[:border].view(num_decode, self.decode_width),
            values[border:].view(num_prefill, self.prefill_width),
        )

    def reply_views(self, message: Tensor, num_decode: int) -> tuple[Tensor, Tensor]:
        """(out_UMD, lse2_UM) inside a reply's bytes."""
        border = num_decode * self.out_width * self.dtype.itemsize
        out = message[:border].view(self.dtype).view(num_decode, self.num_queries, self.head_dim)
        lse2 = message[border:].view(torch.float32).view(num_decode, self.num_queries)
        return out, lse2
