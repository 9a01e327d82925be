"""Attention of one primary: its own lanes here, the others on the workers, all at the same time.

Per layer: pack and send first, so that the workers begin; append and attend locally meanwhile; then collect. Pages of
migrating lanes follow (`page_transfer.py`).
"""

from torch import Tensor

from hetis.comm.links.base import Link
from hetis.core.step_times import Activity
from hetis.ranks.page_transfer import HomeTransfers
from hetis.ranks.pool import PagePool
from hetis.ranks.step_input import PrimaryInput
from hetis.ranks.timer import StageTimer
from hetis.ranks.wire import WireFormat
from hetis_kernels import flash_prefill, kv_append, lane_pack, lane_unpack, paged_decode, paged_prefill


class SplitAttention:
    """The attention that the decoder calls in every layer (`models.decoder.Attention`)."""

    def __init__(
        self,
        pool: PagePool,
        links: dict[int, Link],
        wire: WireFormat,
        windows: tuple[int, ...],
        scale: float,
        timer: StageTimer,
        scratch: Tensor | None,
        transfers: HomeTransfers,
    ) -> None:
        """`windows`: per layer of this stage. `scale`: of scores. `scratch`: for `paged_decode`, this object's own."""
        self._pool, self._links, self._wire, self._windows = pool, links, wire, windows
        self._scale, self._timer, self._scratch, self._transfers = scale, timer, scratch, transfers
        self._step: PrimaryInput

    def begin(self, step: PrimaryInput) -> None:
        self._step = step

    def attend(self, layer: int, qkv_TGHD: Tensor, out_TGMD: Tensor) -> None:
        """Writes the attention of every new token and local head group into `out_TGMD`."""
        self._timer.lap(Activity.DENSE)
        T, G, H, D = qkv_TGHD.shape
        qkv_NHD, out_NMD = qkv_TGHD.view(T * G, H, D), out_TGMD.view(T * G, H - 2, D)
        self._send(qkv_NHD.view(T * G, H * D))
        self._decode(layer, qkv_NHD, out_NMD)
        self._attend_prompts(layer, qkv_TGHD, out_TGMD)
        self._collect(out_NMD.view(T * G, (H - 2) * D))
        self._transfers.exchange(layer)

    def _send(self, qkv_NF: Tensor) -> None:
        """One request for each worker: q, k, v of its decode lanes, k, v of the prompt tokens that it keeps."""
        wire = self._wire
        for route in self._step.routes:
            link, num_decode, num_prefill = self._links[route.peer], len(route.decode_qkv_U), len(route.prefill_qkv_A)
            message = link.send_buffer(wire.request_bytes(num_decode, num_prefill))
            qkv_UHD, kv_A2D = wire.request_views(message, num_decode, num_prefill)
            if num_decode:
                lane_pack(qkv_NF, route.decode_qkv_U, qkv_UHD.flatten(1))
            if num_prefill:
                lane_pack(qkv_NF[:, wire.out_width :], route.prefill_qkv_A, kv_A2D.flatten(1))
            link.send()
            self._timer.on_sent(route.peer)

    def _decode(self, layer: int, qkv_NHD: Tensor, out_NMD: Tensor) -> None:
        """Appends all new tokens that are kept here, and attends over the decode lanes that live here."""
        pages_2PSD, lanes, append = self._pool.pages_L2PSD[layer], self._step.local, self._step.append
        if len(append):
            kv_append(qkv_NHD[:, -2], qkv_NHD[:, -1], pages_2PSD, append.qkv_A, append.cell_A)
            self._timer.lap(Activity.APPEND)
        if len(lanes):
            paged_decode(
                qkv_NHD[:, :-2], pages_2PSD, self._pool.table_BW, lanes.lane_U, lanes.qkv_U, lanes.length_U,
                self._scale, self._windows[layer], out_NMD, max_length=lanes.max_length, scratch=self._scratch,
            )  # fmt: skip
            self._timer.lap(Activity.ATTENTION)

    def _attend_prompts(self, layer: int, qkv_TGHD: Tensor, out_TGMD: Tensor) -> None:
        window = self._windows[layer]
        if (chunks := self._step.prefill) is not None:
            tokens = slice(chunks.first_token, chunks.stop_token)
            paged_prefill(
                qkv_TGHD[tokens, :, :-2], self._pool.pages_L2PSD[layer], self._pool.table_BW, chunks.query_start_C1,
                chunks.lane_CG, chunks.context_C, self._scale, window, out_TGMD[tokens],
            )  # fmt: skip
            self._timer.lap(Activity.PROMPT)
        if (prompts := self._step.whole_prompts) is not None:
            first = prompts.first_token
            flash_prefill(
                qkv_TGHD[first:], prompts.query_start_C1, prompts.max_tokens, self._scale, window, out_TGMD[first:]
            )
            self._timer.lap(Activity.PROMPT)

    def _collect(self, out_NF: Tensor) -> None:
        """The replies of all workers that attended."""
        for route in self._step.routes:
            if num_decode := len(route.decode_qkv_U):
                link = self._links[route.peer]
                reply = link.recv(self._wire.reply_bytes(num_decode))
                self._timer.on_received(route.peer)
                lane_unpack(self._wire.reply_view(reply, num_decode).flatten(1), route.decode_qkv_U, out_NF)
                link.release()
                self._timer.lap(Activity.SEND)
