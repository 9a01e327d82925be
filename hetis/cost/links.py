"""Bytes of the buffers of links: the largest messages, and what either end allocates for them (`hetis.comm.links`).

G head groups of a home, M query heads per group, D head_dim, T tokens and U decode tokens of a step, H hidden size.
"""

from collections.abc import Mapping
from typing import NamedTuple

from hetis.core.device_info import DeviceInfo
from hetis.core.model_spec import ModelSpec
from hetis.core.plan import Plan
from hetis.cost.footprint import hidden_bytes, page_bytes
from hetis.cost.limits import Limits

TRANSFER_BYTES = 1 << 20  # pages of migrating lanes that a message carries at most, if that is a page or more
NUM_BUFFERS = 2  # of one direction
SHARED_PAGE_BYTES = 4096  # to which shared memory rounds; the first page has the counters


class PlannedLink(NamedTuple):
    """A link to an attention worker, or to a rank of the next stage."""

    first: int  # rank that creates what the two ends share
    second: int
    request_bytes: int  # largest message from first to second
    reply_bytes: int

    def other(self, rank: int) -> int:
        return self.second if rank == self.first else self.first


def links_of(spec: ModelSpec, plan: Plan, rank: int, limits: Limits) -> list[PlannedLink]:
    """All links of a rank."""
    hidden = hidden_bytes(spec, limits)
    links = [PlannedLink(sender, receiver, hidden, 0) for sender, receiver in plan.handovers]
    links += [
        PlannedLink(home.rank, worker.rank, *message_bytes(spec, home.num_groups, limits))
        for home, worker in plan.links
    ]
    return [link for link in links if rank in (link.first, link.second)]


def message_bytes(spec: ModelSpec, num_groups: int, limits: Limits) -> tuple[int, int]:
    """Largest messages (to a worker, to the home) on a link of a home with so many groups: tokens, or pages of a layer.

    Values: G U (M + 2) D + G T 2 D in a request, G U M D in a reply, of U decode and T prompt tokens.
    """
    decodes, prompts = limits.max_num_decodes * num_groups, limits.max_num_batched_tokens * num_groups
    head_bytes = spec.head_dim * limits.value_bytes
    request = (decodes * spec.heads_per_group + prompts * 2) * head_bytes
    reply = decodes * spec.queries_per_group * head_bytes
    pages = transfer_bytes(spec, limits)
    return max(request, pages), max(reply, pages)


def max_transfer_pages(spec: ModelSpec, block_size: int, dtype: str) -> int:
    """Most pages of migrating lanes, one layer of each, in a message."""
    return max(1, TRANSFER_BYTES // page_bytes(spec, 1, block_size, dtype))


def transfer_bytes(spec: ModelSpec, limits: Limits) -> int:
    """Most bytes of migrating lanes in a message."""
    pages = max_transfer_pages(spec, limits.block_size, limits.dtype)
    return pages * page_bytes(spec, 1, limits.block_size, limits.dtype)


def link_bytes(link: PlannedLink, rank: int, infos: Mapping[int, DeviceInfo]) -> int:
    """Buffers at one end of a link, on that rank's device.

    A GPU has buffers for both directions, whatever the link is made of. Between CPUs of one host both ends map the same
    memory: it is counted where it is created, or at the only end that is a CPU. Over TCP messages are received into one
    buffer; what the sockets hold besides is not counted.
    """
    own, other = infos[rank], infos[link.other(rank)]
    is_first = rank == link.first
    sent, received = (link.request_bytes, link.reply_bytes)[:: 1 if is_first else -1]
    if own.is_gpu:
        return NUM_BUFFERS * (sent + received)
    if own.host != other.host:
        return NUM_BUFFERS * sent + received
    if not is_first and not other.is_gpu:
        return 0
    rounded = aligned(sent, SHARED_PAGE_BYTES) + aligned(received, SHARED_PAGE_BYTES)
    return SHARED_PAGE_BYTES + NUM_BUFFERS * rounded


def aligned(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
