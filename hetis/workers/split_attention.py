"""Attention of one primary: its own lanes here, the others on the workers, all at the same time.

Per layer: pack and send first, so that the workers begin; append and attend locally meanwhile; then collect.
"""

from time import perf_counter

import torch
from torch import Tensor

from hetis.cache.pool import PagePool
from hetis.comm.links.base import Link
from hetis.workers.step_input import PrimaryInput
from hetis.workers.wire import WireFormat
from hetis_kernels import kv_append, lane_pack, lane_unpack, paged_decode, paged_prefill


class SplitAttention:
    """What the decoder calls in every layer (`models.decoder.Attention`)."""

    def __init__(
        self,
        pool: PagePool,
        links: dict[int, Link],
        wire: WireFormat,
        windows: tuple[int, ...],
        scale: float,
        max_rows: int,
        device: torch.device,
    ) -> None:
        """`windows`: per layer of this stage. `scale`: of scores. `max_rows`: most (token, group) pairs of a step."""
        self._pool, self._links, self._wire, self._windows = pool, links, wire, windows
        self._scale = scale
        self._lse2_NM = torch.empty(max_rows, wire.num_queries, dtype=torch.float32, device=device)
        self._step: PrimaryInput
        self.local_seconds = 0.0  # attention over lanes and prompts of this rank

    def begin(self, step: PrimaryInput) -> None:
        self._step = step

    def attend(self, layer: int, qkv_TGHD: Tensor, out_TGMD: Tensor) -> None:
        """Writes the attention of every new token and local head group into `out_TGMD`."""
        T, G, H, D = qkv_TGHD.shape
        qkv_NHD = qkv_TGHD.view(T * G, H, D)
        out_NMD = out_TGMD.view(T * G, H - 2, D)
        self._send(qkv_NHD)
        begin = perf_counter()
        self._attend_here(layer, qkv_TGHD, qkv_NHD, out_TGMD, out_NMD)
        self.local_seconds += perf_counter() - begin
        self._collect(out_NMD)

    def _send(self, qkv_NHD: Tensor) -> None:
        wire = self._wire
        rows_NF = qkv_NHD.view(qkv_NHD.shape[0], wire.decode_width)
        for route in self._step.routes:
            num_decode, num_prefill = len(route.decode_row_U), len(route.prefill_row_A)
            link = self._links[route.peer]
            message = link.send_buffer(wire.request_bytes(num_decode, num_prefill))
            qkv_UF, kv_AF = wire.request_views(message, num_decode, num_prefill)
            if num_decode:
                lane_pack(rows_NF, route.decode_row_U, qkv_UF)
            if num_prefill:
                lane_pack(rows_NF[:, wire.out_width :], route.prefill_row_A, kv_AF)
            link.send()

    def _attend_here(self, layer: int, qkv_TGHD: Tensor, qkv_NHD: Tensor, out_TGMD: Tensor, out_NMD: Tensor) -> None:
        step, M = self._step, self._wire.num_queries
        pages_2PSD, window = self._pool.pages_L2PSD[layer], self._windows[layer]
        table_BW, lse2_NM = self._pool.table_BW, self._lse2_NM
        if len(step.append):
            kv_append(qkv_NHD[:, M], qkv_NHD[:, M + 1], pages_2PSD, step.append.row_A, step.append.slot_A)
        if len(step.local):
            lanes = step.local
            paged_decode(
                qkv_NHD[:, :M], pages_2PSD, table_BW, lanes.lane_U, lanes.row_U, lanes.length_U,
                self._scale, window, out_NMD, lse2_NM[: len(out_NMD)], max_length=lanes.max_length,
            )  # fmt: skip
        if step.prefill is not None:
            chunks, first = step.prefill, step.num_decode
            T, G = qkv_TGHD.shape[0] - first, qkv_TGHD.shape[1]
            paged_prefill(
                qkv_TGHD[first:, :, :M], pages_2PSD, table_BW, chunks.query_start_C1, chunks.lane_CG, chunks.context_C,
                self._scale, window, out_TGMD[first:], lse2_NM[: T * G].view(T, G, M),
            )  # fmt: skip

    def _collect(self, out_NMD: Tensor) -> None:
        wire = self._wire
        out_NF = out_NMD.view(len(out_NMD), wire.out_width)
        for route in self._step.routes:
            num_decode = len(route.decode_row_U)
            if num_decode == 0:
                continue
            link = self._links[route.peer]
            out_UMD, _ = wire.reply_views(link.recv(wire.reply_bytes(num_decode)), num_decode)
            lane_unpack(out_UMD.view(num_decode, wire.out_width), route.decode_row_U, out_NF)
            link.release()
