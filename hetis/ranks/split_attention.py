"""Attention of one primary: its own lanes here, the others on the workers, all at the same time.

Per layer: pack and send first, so that the workers begin; append and attend locally meanwhile; then collect.
"""

import torch
from torch import Tensor

from hetis.comm.links.base import Link
from hetis.core.step_times import Activity
from hetis.ranks.pool import PagePool
from hetis.ranks.step_input import PrimaryInput
from hetis.ranks.timer import StageTimer
from hetis.ranks.wire import WireFormat
from hetis_kernels import flash_prefill, kv_append, lane_pack, lane_unpack, paged_decode, paged_prefill


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
        timer: StageTimer,
        scratch: Tensor | None,
    ) -> None:
        """`windows`: per layer of this stage. `scale`: of scores. `max_rows`: most (token, group) pairs of a step.

        `scratch`: for `paged_decode`, this object's own.
        """
        self._pool, self._links, self._wire, self._windows = pool, links, wire, windows
        self._scale, self._timer, self._scratch = scale, timer, scratch
        self._lse2_NM = torch.empty(max_rows, wire.num_queries, dtype=torch.float32, device=device)
        self._step: PrimaryInput

    def begin(self, step: PrimaryInput) -> None:
        self._step = step

    def attend(self, layer: int, qkv_TGHD: Tensor, out_TGMD: Tensor) -> None:
        """Writes the attention of every new token and local head group into `out_TGMD`."""
        self._timer.lap(Activity.DENSE)
        T, G, H, D = qkv_TGHD.shape
        qkv_NHD = qkv_TGHD.view(T * G, H, D)
        out_NMD = out_TGMD.view(T * G, H - 2, D)
        self._send(layer, qkv_NHD)
        self._attend_here(layer, qkv_TGHD, qkv_NHD, out_TGMD, out_NMD)
        self._collect(layer, out_NMD)

    def finish(self) -> None:
        """After the last layer: its pages of lanes on the move, which no message of a layer could bring."""
        wire, last = self._wire, len(self._windows) - 1
        for route in self._step.routes:
            if num_pages := route.haul.num_out:
                link = self._links[route.peer]
                message = link.send_buffer(wire.request_bytes(0, 0, num_pages))
                route.haul.write(last, wire.request_views(message, 0, 0, num_pages)[2])
                link.send()
                self._timer.lap(Activity.MIGRATION)

    def carry(self, qkv_TGHD: Tensor, out_TGMD: Tensor) -> None:
        """A step without tokens, in which only pages travel."""
        for layer in range(len(self._windows)):
            self.attend(layer, qkv_TGHD[:0], out_TGMD[:0])

    def _send(self, layer: int, qkv_NHD: Tensor) -> None:
        """One message for each worker: its lanes, prompt tokens that it keeps, and pages of the layer before."""
        wire = self._wire
        rows_NF = qkv_NHD.view(qkv_NHD.shape[0], wire.decode_width)
        for route in self._step.routes:
            num_decode, num_prefill = len(route.decode_qkv_U), len(route.prefill_qkv_A)
            num_pages = route.haul.num_out if layer else 0
            num_bytes = wire.request_bytes(num_decode, num_prefill, num_pages)
            if not num_bytes:
                continue
            link = self._links[route.peer]
            message = link.send_buffer(num_bytes)
            qkv_UF, kv_AF, pages_N12SD = wire.request_views(message, num_decode, num_prefill, num_pages)
            if num_decode:
                lane_pack(rows_NF, route.decode_qkv_U, qkv_UF)
            if num_prefill:
                lane_pack(rows_NF[:, wire.out_width :], route.prefill_qkv_A, kv_AF)
            if num_pages:
                self._timer.lap(Activity.SEND)
                route.haul.write(layer - 1, pages_N12SD)
                self._timer.lap(Activity.MIGRATION)
            link.send()
            self._timer.on_sent(route.peer)

    def _attend_here(self, layer: int, qkv_TGHD: Tensor, qkv_NHD: Tensor, out_TGMD: Tensor, out_NMD: Tensor) -> None:
        step, M = self._step, self._wire.num_queries
        pages_2PSD, window = self._pool.pages_L2PSD[layer], self._windows[layer]
        table_BW, lse2_NM = self._pool.table_BW, self._lse2_NM
        if len(step.append):
            kv_append(qkv_NHD[:, M], qkv_NHD[:, M + 1], pages_2PSD, step.append.qkv_A, step.append.cell_A)
            self._timer.lap(Activity.APPEND)
        if len(step.local):
            lanes = step.local
            paged_decode(
                qkv_NHD[:, :M], pages_2PSD, table_BW, lanes.lane_U, lanes.qkv_U, lanes.length_U,
                self._scale, window, out_NMD, lse2_NM[: len(out_NMD)],
                max_length=lanes.max_length, scratch=self._scratch,
            )  # fmt: skip
            self._timer.lap(Activity.ATTENTION)
        if (chunks := step.prefill) is not None:
            tokens = slice(chunks.first_token, chunks.stop_token)
            out = out_TGMD[tokens]
            paged_prefill(
                qkv_TGHD[tokens, :, :M], pages_2PSD, table_BW, chunks.query_start_C1, chunks.lane_CG, chunks.context_C,
                self._scale, window, out, lse2_NM[: out[..., 0, 0].numel()].view(*out.shape[:3]),
            )  # fmt: skip
            self._timer.lap(Activity.PROMPT)
        if (prompts := step.whole_prompts) is not None:
            first = prompts.first_token
            flash_prefill(
                qkv_TGHD[first:], prompts.query_start_C1, prompts.max_tokens, self._scale, window, out_TGMD[first:]
            )
            self._timer.lap(Activity.PROMPT)

    def _collect(self, layer: int, out_NMD: Tensor) -> None:
        wire = self._wire
        out_NF = out_NMD.view(len(out_NMD), wire.out_width)
        for route in self._step.routes:
            num_decode, num_pages = len(route.decode_qkv_U), route.haul.num_in
            if not (num_decode or num_pages):
                continue
            link = self._links[route.peer]
            reply = link.recv(wire.reply_bytes(num_decode, num_pages))
            if num_decode and not num_pages:
                self._timer.on_received(route.peer)
            else:
                self._timer.lap(Activity.WAIT)
            out_UMD, _, pages_N12SD = wire.reply_views(reply, num_decode, num_pages)
            if num_decode:
                lane_unpack(out_UMD.view(num_decode, wire.out_width), route.decode_qkv_U, out_NF)
                self._timer.lap(Activity.SEND)
            if num_pages:
                route.haul.read(layer, pages_N12SD)
                self._timer.lap(Activity.MIGRATION)
            link.release()
