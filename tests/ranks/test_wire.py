"""Messages hold all their parts, one behind the other, and pages where kernels expect them."""

import itertools

import pytest
import torch

from hetis.ranks.wire import PAGE_ALIGNMENT, WireFormat

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_queries", "head_dim"), [(1, 8), (3, 20), (7, 80)])
def test_parts_of_messages_neither_overlap_nor_leave_the_message(
    num_queries: int, head_dim: int, dtype: torch.dtype
) -> None:
    wire = WireFormat(num_queries, head_dim, 4, dtype)
    for num_decode, num_prefill, num_pages in itertools.product((0, 1, 3), (0, 5), (0, 1, 2)):
        request, reply = (num_decode, num_prefill, num_pages), (num_decode, num_pages)
        for num_bytes, views, counts in (
            (wire.request_bytes(*request), wire.request_views, request),
            (wire.reply_bytes(*reply), wire.reply_views, reply),
        ):
            parts = views(torch.zeros(num_bytes, dtype=torch.uint8), *counts)
            for value, part in enumerate(parts, 1):
                part.fill_(value)
            for value, part in enumerate(parts, 1):
                assert (part == value).all(), "another part wrote into it"
            assert num_bytes - sum(part.nbytes for part in parts) < PAGE_ALIGNMENT
            assert parts[2].data_ptr() % PAGE_ALIGNMENT == 0
            assert num_pages or num_bytes == sum(part.nbytes for part in parts), "nothing is added without pages"
