"""Measurement of a rank: decode attention, memory bandwidth, layers without attention, prompt attention, links.

Runs before the first step, with the kernels, shapes and links of steps, but outside of the rank's KV cache. The samples
go to the driver, which fits formulas to them (`cost/fit.py`).

U lanes, W pages of a lane, M query heads per group, D head_dim, P pages, S tokens per page, T tokens, G head groups.
"""

from functools import partial
from time import perf_counter

import msgspec
import numpy as np
import torch
from torch import Tensor

from hetis.comm.collectives import TensorParallel
from hetis.comm.links.base import Link
from hetis.core.measurements import AttentionSample, DenseSample, PrefillSample
from hetis.core.messages import Measure, Measured, MeasureLink, Setup
from hetis.models.decoder import Decoder
from hetis.ranks.build import TORCH_DTYPES, message_limits, wire_format
from hetis.ranks.measuring.links import answer_probes, probe_link
from hetis.ranks.measuring.rounds import Call, Point, device_timer, spread, time_points
from hetis_kernels import flash_prefill, paged_decode, paged_prefill
from hetis_kernels.dispatch import cpu_op
from hetis_kernels.flash_prefill import flash_serves

COLD_BYTES = 256 << 20  # more than caches of processors hold
MIN_BYTES = 4 << 20  # of pages, even if less memory is free: one page alone does not separate the terms of a fit
READ_CALLS = 5
PREFILL_SHARE = 0.35  # of the time for layers


class Measurer:
    """Executes the driver's measuring commands on this rank."""

    def __init__(
        self,
        setup: Setup,
        rank: int,
        links: dict[int, Link],
        device: torch.device,
        decoder: Decoder | None = None,
        tensor_parallel: TensorParallel | None = None,
    ) -> None:
        """`links`: by peer rank. `decoder` and `tensor_parallel`: of a primary."""
        self._setup, self._rank, self._links, self._device = setup, rank, links, device
        self._decoder, self._tensor_parallel = decoder, tensor_parallel

    @torch.inference_mode()
    def measure(self, command: Measure | MeasureLink) -> Measured:
        begin = perf_counter()
        if isinstance(command, MeasureLink):
            found = self._measure_link(command)
        elif command.part == "attention":
            found = self._measure_attention(command.seconds)
        else:
            found = self._measure_layers(command.seconds)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # steps use the same links on other streams
            torch.cuda.empty_cache()
        return msgspec.structs.replace(found, seconds=perf_counter() - begin)

    def _measure_attention(self, seconds: float) -> Measured:
        setup = self._setup
        scratch = Scratch(setup, affordable(COLD_BYTES, self._device), self._device)
        max_lanes = min(setup.max_num_seqs * setup.spec.num_head_groups, scratch.num_pages)
        return Measured(
            rank=self._rank,
            seconds=0.0,
            read_bytes_per_us=read_bandwidth(scratch.pool_2PSD),
            attention=measure_decode(setup, scratch, max_lanes, seconds),
        )

    def _measure_layers(self, seconds: float) -> Measured:
        assert self._decoder is not None
        assert self._tensor_parallel is not None
        setup, groups = self._setup, self._setup.plan.primary(self._rank).num_groups
        return Measured(
            rank=self._rank,
            seconds=0.0,
            dense=measure_dense(
                setup, self._decoder, self._tensor_parallel, self._device, seconds * (1 - PREFILL_SHARE)
            ),
            prefill=measure_prefill(setup, groups, self._device, seconds * PREFILL_SHARE) if groups else [],
        )

    def _measure_link(self, command: MeasureLink) -> Measured:
        setup, is_primary = self._setup, self._rank == command.primary
        link = self._links[command.worker if is_primary else command.primary]
        counted = link.bytes_sent, link.bytes_received
        found = Measured(rank=self._rank, seconds=0.0)
        if is_primary:
            wire = wire_format(setup)
            smallest = wire.request_bytes(1, 0), wire.reply_bytes(1)
            largest = message_limits(setup, setup.plan.primary(command.primary))
            found.request, found.reply = probe_link(link, self._device, smallest, largest, command.seconds)
        else:
            answer_probes(link, self._device)
        link.bytes_sent, link.bytes_received = counted  # statistics count tokens of steps only
        return found


class Scratch:
    """Pages of one layer outside of the KV cache. Successive tables have different pages, until all have been used."""

    def __init__(self, setup: Setup, num_bytes: int, device: torch.device) -> None:
        dtype, self.page_size, head_dim = TORCH_DTYPES[setup.dtype], setup.block_size, setup.spec.head_dim
        num_pages = max(1, num_bytes // (2 * self.page_size * head_dim * dtype.itemsize))
        self.pool_2PSD = torch.empty(2, num_pages, self.page_size, head_dim, dtype=dtype, device=device)
        self.pool_2PSD[:] = torch.randn(self.page_size, head_dim, device=device).to(dtype)
        self._order_P = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
        self._next = 0

    @property
    def num_pages(self) -> int:
        return len(self._order_P)

    def take(self, num_lanes: int, num_tokens: int) -> Tensor:
        """Page table of a call: int32 [U, W]. Its pages are scattered, as in a cache after long use."""
        width = -(-num_tokens // self.page_size)
        index = np.arange(self._next, self._next + num_lanes * width) % self.num_pages
        self._next = (self._next + len(index)) % self.num_pages
        return torch.from_numpy(self._order_P[index].reshape(num_lanes, width)).to(self.pool_2PSD.device)


def affordable(num_bytes: int, device: torch.device) -> int:
    """`num_bytes`, but on a GPU at most half of the free memory, or `MIN_BYTES` if that is more."""
    if device.type != "cuda":
        return num_bytes
    return min(num_bytes, max(MIN_BYTES, torch.cuda.mem_get_info(device)[0] // 2))


def read_bandwidth(memory: Tensor) -> float:
    """Bandwidth of reading `memory` sequentially, in bytes per microsecond."""
    stream_read = cpu_op("stream_read") if memory.device.type == "cpu" else None
    words = memory.view(-1).view(torch.int32)

    def read() -> None:
        if stream_read is None:
            words.sum(dtype=torch.int64)
        else:
            stream_read(memory)

    timer = device_timer(memory.device)
    return memory.nbytes / float(np.quantile([timer(read) for _ in range(READ_CALLS)], 0.25))


# --- attention --------------------------------------------------------------------------------------------------------


def measure_decode(setup: Setup, scratch: Scratch, max_lanes: int, seconds: float) -> list[AttentionSample]:
    """Samples of one to `max_lanes` lanes, of one page to the longest context, as far as the scratch pages suffice.

    One lane is timed with all six lengths, and one page with all seven numbers of lanes, which suffices for a fit. KV
    is cold, as in a step, where all other layers are read between two uses of one layer.
    """
    spec, pool_2PSD, device = setup.spec, scratch.pool_2PSD, scratch.pool_2PSD.device
    shape = (max_lanes, spec.queries_per_group, spec.head_dim)
    q_UMD = torch.randn(shape, device=device).to(pool_2PSD.dtype)
    out_UMD = torch.empty_like(q_UMD)
    order_U = torch.arange(max_lanes, dtype=torch.int32, device=device)

    def prepare(lanes: int, tokens: int) -> Call:
        table_UW = scratch.take(lanes, tokens)
        length_U = torch.full((lanes,), tokens, dtype=torch.int32, device=device)
        lane_U = qkv_U = order_U[:lanes]

        def call() -> None:
            paged_decode(
                q_UMD[:lanes], pool_2PSD, table_UW, lane_U, qkv_U, length_U, spec.attention_scale, 0,
                out_UMD[:lanes], max_length=tokens,
            )  # fmt: skip

        return call

    longest = min(setup.max_model_len, scratch.num_pages * scratch.page_size)
    lengths = spread(min(scratch.page_size, longest), longest, 6)
    grid = [(lanes, tokens) for lanes in spread(1, max_lanes, 7) for tokens in lengths]
    grid = [(lanes, tokens) for lanes, tokens in grid if lanes * -(-tokens // scratch.page_size) <= scratch.num_pages]
    grid.sort(key=lambda point: point[0] * point[1])
    points = [Point(lanes * tokens, partial(prepare, lanes, tokens)) for lanes, tokens in grid]
    times = time_points(points, device_timer(device), seconds)
    per_token = spec.kv_bytes_per_token(1, setup.dtype)
    return [
        AttentionSample(lanes * spec.queries_per_group, lanes * tokens * per_token, time_us)
        for (lanes, tokens), time_us in zip(grid, times, strict=False)
    ]


def measure_prefill(setup: Setup, num_groups: int, device: torch.device, seconds: float) -> list[PrefillSample]:
    """Samples of one prompt chunk of 16 tokens up to the largest, as a whole prompt and after 3 and 15 times as many
    tokens. flash-attn computes the whole prompt where steps use it."""
    spec, dtype = setup.spec, TORCH_DTYPES[setup.dtype]
    uses_flash, M = flash_serves(device, dtype, spec.head_dim), spec.queries_per_group
    token_bytes = num_groups * spec.kv_bytes_per_token(1, setup.dtype)
    max_context = min(setup.max_model_len, max(1, affordable(COLD_BYTES, device) // token_bytes))
    longest = min(setup.max_num_batched_tokens, max_context)
    chunks = spread(min(16, longest), longest, 5)
    grid = [(tokens, min(tokens * context, max_context)) for tokens in chunks for context in (1, 4, 16)]
    scratch = Scratch(setup, (grid[-1][1] + setup.block_size) * token_bytes, device)
    qkv_TGHD = torch.randn(longest, num_groups, M + 2, spec.head_dim, device=device).to(dtype)
    out_TGMD = torch.empty_like(qkv_TGHD[:, :, :M], memory_format=torch.contiguous_format)
    lane_CG = torch.arange(num_groups, dtype=torch.int32, device=device)[None]

    def prepare(tokens: int, context: int) -> Call:
        table_UW = scratch.take(num_groups, context)
        start_C1 = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        context_C = torch.tensor([context], dtype=torch.int32, device=device)

        def call() -> None:
            paged_prefill(
                qkv_TGHD[:tokens, :, :M], scratch.pool_2PSD, table_UW, start_C1, lane_CG, context_C,
                spec.attention_scale, 0, out_TGMD[:tokens],
            )  # fmt: skip

        def call_flash() -> None:
            flash_prefill(qkv_TGHD[:tokens], start_C1, tokens, spec.attention_scale, 0, out_TGMD[:tokens])

        return call_flash if uses_flash and context == tokens else call

    def pairs(tokens: int, context: int) -> int:
        seen = tokens * (context - tokens) + tokens * (tokens + 1) // 2
        return seen * num_groups * spec.queries_per_group

    grid.sort(key=lambda point: pairs(*point))
    points = [Point(pairs(*point), partial(prepare, *point)) for point in grid]
    times = time_points(points, device_timer(device), seconds)
    return [PrefillSample(pairs(*point), time_us) for point, time_us in zip(grid, times, strict=False)]


# --- layers -----------------------------------------------------------------------------------------------------------


class _NoAttention:
    """Attention that only fills its output with finite values, once."""

    def __init__(self) -> None:
        self._num_filled = 0

    def attend(self, layer: int, qkv_TGHD: Tensor, out_TGMD: Tensor) -> None:
        if len(out_TGMD) > self._num_filled:
            out_TGMD.fill_(0.01)
            self._num_filled = len(out_TGMD)


def measure_dense(
    setup: Setup, decoder: Decoder, tensor_parallel: TensorParallel, device: torch.device, seconds: float
) -> list[DenseSample]:
    """Samples of layers without attention, from one token to the largest step, on all primaries of a stage at once.

    Few tokens pass through so many layers that their weights exceed the caches, many tokens through fewer. Means over
    the ranks decide about that and about the end, so that all ranks make the same calls.
    """
    max_tokens, hidden_size = setup.max_num_batched_tokens, setup.spec.hidden_size
    hidden_TH = torch.ones(max_tokens, hidden_size, dtype=TORCH_DTYPES[setup.dtype], device=device)
    position_T = torch.arange(max_tokens, device=device) % setup.max_model_len
    attention, timer = _NoAttention(), device_timer(device)

    def agree(value: float) -> float:
        shared = torch.tensor([value], dtype=torch.float32, device=device)
        tensor_parallel.all_reduce(shared)
        return float(shared) / tensor_parallel.size

    def agreed_us(call: Call) -> float:
        agree(0.0)  # ranks begin together
        return agree(timer(call))

    def forward(tokens: int, layers: int) -> Call:
        def call() -> None:
            decoder.forward(hidden_TH[:tokens], position_T[:tokens], attention, num_layers=layers)

        hidden_TH.fill_(1.0)  # every pass adds to it
        return call

    cold_layers = COLD_BYTES / agree(float(decoder.layer_bytes))
    agreed_us(forward(1, 1))
    affordable_layers = seconds * 1e6 / 64 / agreed_us(forward(1, 1))  # 4 rounds of 16 such passes
    max_layers = min(cold_layers, affordable_layers, float(decoder.num_layers))

    def layers_for(tokens: int) -> int:
        return max(1, round(max_layers * min(1.0, 16 / tokens)))

    grid = [(tokens, layers_for(tokens)) for tokens in spread(1, max_tokens, 12)]
    points = [Point(tokens * layers, partial(forward, tokens, layers)) for tokens, layers in grid]
    times = time_points(points, agreed_us, seconds)
    return [DenseSample(tokens, time_us / layers) for (tokens, layers), time_us in zip(grid, times, strict=False)]
