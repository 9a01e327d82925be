"""An attention worker: no weights, only KV pages. One thread per pipeline stage serves the homes of that stage.

A worker obeys the same steps as the primaries, so it knows which lanes each message carries. Within a stage,
homes are served in tensor-parallel order, layer by layer; stages are independent, so that micro-batches of different
stages never wait for each other here.
"""

import queue
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from hetis.comm.links.base import Link
from hetis.comm.streams import own_stream
from hetis.core.device_info import RankStats
from hetis.core.messages import Setup, StepTimes
from hetis.core.messages.step_command import Step
from hetis.core.step_times import Activity
from hetis.ranks.build import decode_scratch, make_pool, wire_format
from hetis.ranks.measuring.devices import Measurer
from hetis.ranks.page_transfer import WorkerTransfers
from hetis.ranks.step_input import StepPlanner, WorkerInput
from hetis.ranks.timer import StageTimer, attention_seconds, step_times
from hetis_kernels import kv_append, paged_decode

Served = list[tuple[Link, WorkerInput]]  # links of a stage that carry tokens in a step, in tensor-parallel order


class StageServer:
    """Serves the homes of one stage, on a CUDA stream of its own.

    On a common stream a stage might wait for a message that comes only after another stage, queued behind it, answers.
    """

    def __init__(self, setup: Setup, rank: int, stage_index: int, links: dict[int, Link], device: torch.device) -> None:
        """`links`: by primary rank."""
        stage, spec = setup.plan.stages[stage_index], setup.spec
        self._rank, self._homes = rank, [(home, links[home.rank]) for home in stage.homes]
        self._wire, self._scale = wire_format(setup), spec.attention_scale
        self._windows = spec.windows[slice(*stage.layers)]
        self._stream = own_stream(device)
        self._scratch = decode_scratch(setup, max(home.num_groups for home in stage.homes), device)
        self._pool = make_pool(setup, rank, stage_index, device)
        self._planner = StepPlanner(self._pool, spec.num_head_groups, setup.max_num_seqs, self._windows, device)
        self._timer = StageTimer(stage_index, self._wire.num_queries, device, setup.trace)
        self._transfers = WorkerTransfers(self._pool, self._homes, spec.num_head_groups, self._timer.lap)
        self.attention_seconds = 0.0
        self.last_step = -1  # that it has finished

    def serve(self, step: Step) -> StepTimes:
        """Serves one step: in every layer the requests of all homes, then the pages of migrating lanes."""
        wire, lap = self._wire, self._timer.lap
        with self._stream:
            served = self._begin(step)
            for layer, window in enumerate(self._windows):
                for link, inputs in served:
                    qkv_UHD, lanes = self._receive(layer, link, inputs), inputs.lanes
                    if len(lanes):
                        out_UMD = wire.reply_view(link.send_buffer(wire.reply_bytes(len(lanes))), len(lanes))
                        lap(Activity.SEND)
                        paged_decode(
                            qkv_UHD[:, : wire.num_queries], self._pool.pages_L2PSD[layer], self._pool.table_BW,
                            lanes.lane_U, lanes.qkv_U, lanes.length_U, self._scale, window, out_UMD,
                            max_length=lanes.max_length, scratch=self._scratch,
                        )  # fmt: skip
                        lap(Activity.ATTENTION)
                        link.send()
                        lap(Activity.SEND)
                    link.release()
                self._transfers.exchange(layer)
            return self._report(step, served)

    def _begin(self, step: Step) -> Served:
        self._timer.begin()
        self._planner.apply(step)
        inputs = [(link, self._planner.worker_input(step, home.groups)) for home, link in self._homes]
        self._transfers.begin(step)
        self._planner.upload()
        self._timer.lap(Activity.OTHER)
        return [(link, each) for link, each in inputs if not each.is_empty]

    def _receive(self, layer: int, link: Link, inputs: WorkerInput) -> Tensor:
        """Receives one request and appends its K and V. Returns qkv_UHD of the decode lanes, valid until `release`."""
        pages_2PSD, decode, prompt = self._pool.pages_L2PSD[layer], inputs.append, inputs.prefill_append
        message = link.recv(self._wire.request_bytes(len(decode), len(prompt)))
        self._timer.lap(Activity.WAIT)
        qkv_UHD, kv_A2D = self._wire.request_views(message, len(decode), len(prompt))
        if len(prompt):
            kv_append(kv_A2D[:, 0], kv_A2D[:, 1], pages_2PSD, prompt.qkv_A, prompt.cell_A)
        if len(decode):
            kv_append(qkv_UHD[:, -2], qkv_UHD[:, -1], pages_2PSD, decode.qkv_A, decode.cell_A)
        self._timer.lap(Activity.APPEND)
        return qkv_UHD

    def _report(self, step: Step, served: Served) -> StepTimes:
        num_page_layers = len(self._windows) * self._transfers.num_pages
        times = self._timer.report([inputs.lanes for _, inputs in served], num_page_layers)
        self.attention_seconds += attention_seconds(times)
        self.last_step = step.number
        return step_times(self._rank, step, [times])


class AttentionWorker:
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
        self._servers = [StageServer(setup, rank, stage, links, device) for stage in range(len(setup.plan.stages))]
        self._finished: queue.SimpleQueue[StepTimes] = queue.SimpleQueue()
        self._queues: list[queue.Queue[Step]] = []
        if len(self._servers) > 1:
            for stage, server in enumerate(self._servers):
                steps: queue.Queue[Step] = queue.Queue()
                self._queues.append(steps)
                threading.Thread(target=self._obey, args=(server, steps), name=f"stage {stage}", daemon=True).start()

    @property
    def last_step(self) -> int:
        """The last step that all stages have finished; -1 before the first."""
        return min(server.last_step for server in self._servers)

    def run_step(self, step: Step) -> None:
        """Serves the step, or queues it for the threads of the stages if there are several."""
        if not self._queues:
            self._finished.put(self._servers[0].serve(step))
        for steps in self._queues:
            steps.put(step)

    def _obey(self, server: StageServer, steps: "queue.Queue[Step]") -> None:
        """The thread of one stage: serves queued steps for ever."""
        torch.set_num_threads(torch.get_num_threads())  # OpenMP teams are per thread
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # as is the current device
        try:
            while True:
                self._finished.put(server.serve(steps.get()))
                steps.task_done()
        except BaseException as error:
            self._on_failure(error)

    def take_times(self) -> list[StepTimes]:
        """Times of the steps that stages have finished since the last call."""
        times = []
        while not self._finished.empty():
            times.append(self._finished.get())
        return times

    def forget(self) -> None:
        """Resets counters and times, as if there had been no step, as soon as all so far are done."""
        self._wait()
        self.take_times()
        for server in self._servers:
            server.attention_seconds, server.last_step = 0.0, -1
        for link in self._links.values():
            link.bytes_sent = link.bytes_received = 0

    def stats(self) -> RankStats:
        """The counters, as soon as all steps so far are done."""
        self._wait()
        return RankStats(
            rank=self.rank,
            attention_seconds=sum(server.attention_seconds for server in self._servers),
            bytes_sent={f"{self.rank}->{peer}": link.bytes_sent for peer, link in self._links.items()},
            bytes_received={f"{peer}->{self.rank}": link.bytes_received for peer, link in self._links.items()},
        )

    def _wait(self) -> None:
        """Waits until all steps so far are done."""
        for steps in self._queues:
            steps.join()

    def close(self) -> None:
        for link in self._links.values():
            link.close()
