"""Requests and replies hold all their parts, side by side."""

import itertools

import pytest
import torch

from hetis.ranks.wire import WireFormat

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_queries", "head_dim"), [(1, 8), (3, 20), (7, 80)])
def test_parts_of_messages_fill_the_message_and_do_not_overlap(
    num_queries: int, head_dim: int, dtype: torch.dtype
) -> None:
    wire = WireFormat(num_queries, head_dim, dtype)
    for num_decode, num_prefill in itertools.product((0, 1, 3), (0, 5)):
        message = torch.zeros(wire.request_bytes(num_decode, num_prefill), dtype=torch.uint8)
        qkv_UHD, kv_A2D = wire.request_views(message, num_decode, num_prefill)
        assert qkv_UHD.shape == (num_decode, num_queries + 2, head_dim)
        assert kv_A2D.shape == (num_prefill, 2, head_dim)
        assert qkv_UHD.nbytes + kv_A2D.nbytes == message.nbytes
        qkv_UHD.fill_(1)
        kv_A2D.fill_(2)
        assert (qkv_UHD == 1).all(), "the other part wrote into it"
        assert (kv_A2D == 2).all()
        reply = torch.zeros(wire.reply_bytes(num_decode), dtype=torch.uint8)
        out_UMD = wire.reply_view(reply, num_decode)
        assert out_UMD.shape == (num_decode, num_queries, head_dim)
        assert out_UMD.nbytes == reply.nbytes
