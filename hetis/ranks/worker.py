"""An attention worker: no weights, only cache. One thread per pipeline stage serves the homes of that stage.

A worker obeys the same steps as the primaries, so it knows which lanes each message carries. Within a stage,
homes are served in tensor-parallel order, layer by layer; stages are independent, so that micro-batches of
different stages never wait for each other here.
"""

import queue
import threading
from collections.abc import Callable

import torch

from hetis.comm.links.base import Link
from hetis.comm.streams import own_stream
from hetis.core.device_info import RankStats
from hetis.core.messages import Setup, StepTimes
from hetis.core.messages.step_command import Step
from hetis.core.plan import Stage
from hetis.core.step_times import Activity, StageTimes
from hetis.ranks.build import decode_scratch, make_pool, wire_format
from hetis.ranks.measuring.devices import Measurer
from hetis.ranks.step_input import StepPlanner, WorkerInput
from hetis.ranks.timer import StageTimer, attention_seconds, step_times
from hetis_kernels import kv_append, paged_decode


class StageServer:
    """Serves the homes of one stage, on a CUDA stream of its own.

    On a common stream a stage might wait for a message that comes only after another stage, queued behind it, answers.
    """

    def __init__(self, setup: Setup, rank: int, stage_index: int, links: dict[int, Link], device: torch.device) -> None:
        """`links`: by primary rank."""
        stage: Stage = setup.plan.stages[stage_index]
        self._links = [(home, links[home.rank]) for home in stage.homes]
        self._wire = wire_format(setup)
        self._scale = setup.spec.attention_scale
        first, stop = stage.layers
        self._windows = setup.spec.windows[first:stop]
        self._stream = own_stream(device)
        self._scratch = decode_scratch(setup, max(home.num_groups for home in stage.homes), device)
        self.pool = make_pool(setup, rank, stage_index, device)
        self._planner = StepPlanner(self.pool, setup.spec.num_head_groups, setup.max_num_seqs, self._windows, device)
        self._timer = StageTimer(stage_index, self._wire.num_queries, device, setup.trace)
        self.attention_seconds = 0.0

    def run_step(self, command: Step) -> StageTimes:
        with self._stream:
            times = self._run(command)
        self.attention_seconds += attention_seconds(times)
        return times

    def _run(self, command: Step) -> StageTimes:
        self._timer.begin()
        self._planner.apply(command)
        served: list[tuple[Link, WorkerInput]] = []
        for primary, link in self._links:
            step = self._planner.worker_input(command, primary.rank, primary.groups)
            if not step.is_empty:
                served.append((link, step))
        self._planner.upload()
        self._timer.lap(Activity.OTHER)
        for layer in range(len(self._windows)) if served else ():
            for link, step in served:
                self._serve(layer, link, step)
        for link, step in served:
            self._take_last_pages(link, step)
        inputs = [step for _, step in served]
        return self._timer.report(
            [step.lanes for step in inputs],
            len(self._windows) * sum(step.haul.num_in + step.haul.num_out for step in inputs),
        )

    def _serve(self, layer: int, link: Link, step: WorkerInput) -> None:
        """One message of one layer: keep the new K and V, attend, answer. Pages that came along can wait until then."""
        wire, lap, pages_2PSD = self._wire, self._timer.lap, self.pool.pages_L2PSD[layer]
        num_decode, num_prefill, M, D = len(step.lanes), len(step.prefill_append), wire.num_queries, wire.head_dim
        num_in, num_out = step.haul.num_in if layer else 0, step.haul.num_out
        if num_bytes := wire.request_bytes(num_decode, num_prefill, num_in):
            message = link.recv(num_bytes)
            lap(Activity.WAIT)
            qkv_UF, kv_AF, in_N12SD = wire.request_views(message, num_decode, num_prefill, num_in)
            qkv_UHD = qkv_UF.view(num_decode, M + 2, D)
        if num_prefill:
            kv_A2D = kv_AF.view(num_prefill, 2, D)
            prompt = step.prefill_append
            kv_append(kv_A2D[:, 0], kv_A2D[:, 1], pages_2PSD, prompt.qkv_A, prompt.cell_A)
        if num_decode:
            kv_append(qkv_UHD[:, M], qkv_UHD[:, M + 1], pages_2PSD, step.append.qkv_A, step.append.cell_A)
        lap(Activity.APPEND)
        if num_decode or num_out:
            reply = link.send_buffer(wire.reply_bytes(num_decode, num_out))
            out_UMD, lse2_UM, out_N12SD = wire.reply_views(reply, num_decode, num_out)
            lap(Activity.SEND)
        if num_decode:
            lanes = step.lanes
            paged_decode(
                qkv_UHD[:, :M], pages_2PSD, self.pool.table_BW, lanes.lane_U, lanes.qkv_U, lanes.length_U,
                self._scale, self._windows[layer], out_UMD, lse2_UM, max_length=lanes.max_length, scratch=self._scratch,
            )  # fmt: skip
            lap(Activity.ATTENTION)
        if num_out:
            step.haul.write(layer, out_N12SD)
            lap(Activity.MIGRATION)
        if num_decode or num_out:
            link.send()
            lap(Activity.SEND)
        if num_in:
            step.haul.read(layer - 1, in_N12SD)
            lap(Activity.MIGRATION)
        if num_bytes:
            link.release()

    def _take_last_pages(self, link: Link, step: WorkerInput) -> None:
        """Those of the last layer, which no message of a layer could bring."""
        wire, num_in = self._wire, step.haul.num_in
        if num_in:
            message = link.recv(wire.request_bytes(0, 0, num_in))
            self._timer.lap(Activity.WAIT)
            step.haul.read(len(self._windows) - 1, wire.request_views(message, 0, 0, num_in)[2])
            link.release()
            self._timer.lap(Activity.MIGRATION)


class AttentionRank:
    """All stages of one worker."""

    def __init__(
        self,
        setup: Setup,
        rank: int,
        links: dict[int, Link],
        device: torch.device,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """`on_failure` is called from the thread of a stage that failed; it ends the process."""
        self.rank, self._links, self._device, self._on_failure = rank, links, device, on_failure
        self.measurer = Measurer(setup, rank, links, device)
        stages = range(len(setup.plan.stages))
        self._servers = [StageServer(setup, rank, stage, links, device) for stage in stages]
        self._finished: queue.SimpleQueue[StepTimes] = queue.SimpleQueue()
        self._queues: list[queue.Queue[Step]] = []
        if len(self._servers) > 1:
            self._queues = [queue.Queue() for _ in stages]
            for server, commands in zip(self._servers, self._queues, strict=True):
                threading.Thread(target=self._serve, args=(server, commands), daemon=True).start()

    def run_step(self, command: Step) -> None:
        """Serves the step, or hands it to the stages' threads where there are several."""
        if not self._queues:
            self._run(self._servers[0], command)
        for commands in self._queues:
            commands.put(command)

    def take_times(self) -> list[StepTimes]:
        """Of what has been finished since the last call."""
        times = []
        while not self._finished.empty():
            times.append(self._finished.get())
        return times

    def _run(self, server: StageServer, command: Step) -> None:
        self._finished.put(step_times(self.rank, command, [server.run_step(command)]))

    def _finish(self) -> None:
        """Waits until all commands so far are done."""
        for commands in self._queues:
            commands.join()

    def forget(self) -> None:
        """Counts from zero again, as soon as all commands so far are done."""
        self._finish()
        self.take_times()
        for server in self._servers:
            server.attention_seconds = 0.0
        for link in self._links.values():
            link.bytes_sent = link.bytes_received = 0

    def stats(self) -> RankStats:
        """As soon as all commands so far are done."""
        self._finish()
        return RankStats(
            rank=self.rank,
            attention_seconds=sum(server.attention_seconds for server in self._servers),
            bytes_sent={f"{self.rank}->{peer}": link.bytes_sent for peer, link in self._links.items()},
            bytes_received={f"{peer}->{self.rank}": link.bytes_received for peer, link in self._links.items()},
        )

    def _serve(self, server: StageServer, commands: "queue.Queue[Step]") -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP teams are per thread
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # as is the current device
        try:
            while True:
                self._run(server, commands.get())
                commands.task_done()
        except BaseException as error:
            self._on_failure(error)

    def close(self) -> None:
        for link in self._links.values():
            link.close()
