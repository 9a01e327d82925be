"""A primary: the weights of its shard, and one step after another.

A step on a primary:  embed or receive, layers (with split attention), then hand on, or logits and sample.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from hetis.comm.collectives import Pipeline, TensorParallel
from hetis.comm.links.base import Link
from hetis.core.device_info import RankStats
from hetis.core.messages import Setup, StepCommand, StepResult, StepTimes
from hetis.core.step_times import Activity
from hetis.core.token_logprobs import SCORED_ROWS, TokenLogprobs
from hetis.models.decoder import Decoder
from hetis.ranks.build import TORCH_DTYPES, decode_scratch, make_pool, wire_format
from hetis.ranks.measuring.devices import Measurer
from hetis.ranks.page_transfer import HomeTransfers
from hetis.ranks.sampling.sampler import Sampler
from hetis.ranks.split_attention import SplitAttention
from hetis.ranks.step_input import PrimaryInput, StepPlanner, StepRows
from hetis.ranks.timer import StageTimer, attention_seconds, step_times
from hetis_kernels.flash_prefill import flash_serves, prompt_attention

_log = logging.getLogger(__name__)


class PrimaryRank:
    """One tensor-parallel rank of one stage."""

    def __init__(
        self,
        setup: Setup,
        rank: int,
        decoder: Decoder,
        links: dict[int, Link],
        tensor_parallel: TensorParallel,
        pipeline: Pipeline,
        device: torch.device,
    ) -> None:
        self.rank, self._setup, self._links = rank, setup, links
        self._decoder, self._tensor_parallel, self._pipeline = decoder, tensor_parallel, pipeline
        self.measurer = Measurer(setup, rank, links, device, decoder, tensor_parallel)
        self._stage_index, tp_index = setup.plan.position_of(rank)
        stage = setup.plan.stages[self._stage_index]
        self._primary = stage.primaries[tp_index]
        self._is_first, self._is_last = self._stage_index == 0, self._stage_index == len(setup.plan.stages) - 1
        self._widths = [p.vocab_rows[1] - p.vocab_rows[0] for p in stage.primaries]
        self._workers = [worker.rank for worker in setup.plan.workers]
        first, stop = self._primary.groups
        scratch = decode_scratch(setup, stop - first, device)
        pool, windows = make_pool(setup, rank, self._stage_index, device), setup.spec.windows[slice(*stage.layers)]
        uses_flash = flash_serves(device, TORCH_DTYPES[setup.dtype], setup.spec.head_dim)
        _log.info("attention of prompts by %s", prompt_attention(uses_flash))
        self._planner = StepPlanner(
            pool, setup.spec.num_head_groups, setup.max_num_seqs, windows, device, uses_flash=uses_flash
        )
        self._timer = StageTimer(self._stage_index, setup.spec.queries_per_group, device, setup.trace)
        self._transfers = HomeTransfers(pool, links, self._primary.groups, setup.spec.num_head_groups, self._timer.lap)
        self._attention = SplitAttention(
            pool,
            links,
            wire_format(setup),
            windows,
            setup.spec.attention_scale,
            self._timer,
            scratch,
            self._transfers,
        )
        self._times: list[StepTimes] = []
        self._attention_seconds = 0.0
        self._sampler: Sampler | None = None
        if self._is_last and tp_index == 0:
            self._sampler = Sampler(
                setup.max_num_seqs,
                setup.spec.vocab_size,
                eos_token_ids=setup.eos_token_ids,
                logprobs_mode=setup.logprobs_mode,
                device=device,
            )

    @torch.inference_mode()
    def run_step(self, command: StepCommand) -> StepResult | None:
        """One step; the sampling rank returns its tokens."""
        self._timer.begin()
        self._planner.apply(command)
        self._update_sampler(command)
        step = self._planner.primary_input(command, self._primary.groups, self._workers)
        self._transfers.begin(command)
        self._planner.upload()
        self._attention.begin(step)
        result = self._compute(command, step) if step.num_tokens else self._exchange_pages(command)
        self._note_times(command, step)
        return result

    def _compute(self, command: StepCommand, step: PrimaryInput) -> StepResult | None:
        if self._is_first:
            hidden_TH = self._decoder.embed(step.token_T, step.position_T)
            self._timer.lap(Activity.OTHER)
        else:
            self._timer.lap(Activity.OTHER)
            hidden_TH = self._pipeline.recv(step.num_tokens)
            self._timer.lap(Activity.STAGE)
        hidden_TH = self._decoder.forward(hidden_TH, step.position_T, self._attention)
        self._timer.lap(Activity.DENSE)
        if self._is_last:
            return self._finish(command, step, hidden_TH)
        self._timer.lap(Activity.OTHER)
        self._pipeline.send(hidden_TH)
        self._timer.lap(Activity.STAGE)
        return None

    def _exchange_pages(self, command: StepCommand) -> StepResult | None:
        """A step without tokens: all sequences wait for pages that migrations will free."""
        self._timer.lap(Activity.OTHER)
        for layer in range(self._decoder.num_layers):
            self._transfers.exchange(layer)
        return StepResult(step=command.step, tokens=b"") if self._sampler else None

    def _note_times(self, command: StepCommand, step: PrimaryInput) -> None:
        self._timer.lap(Activity.OTHER)
        times = self._timer.report([step.local], self._transfers.num_pages * self._decoder.num_layers)
        self._attention_seconds += attention_seconds(times)
        self._times.append(step_times(self.rank, command, [times]))

    def take_times(self) -> list[StepTimes]:
        """Of what has been finished since the last call."""
        times, self._times = self._times, []
        return times

    def _finish(self, command: StepCommand, step: PrimaryInput, hidden_TH: Tensor) -> StepResult | None:
        """Logits of the rows that draw a token (and of prompts to be scored), on the sampling rank the tokens."""
        rows = StepRows.of(command)
        sampled = np.frombuffer(command.sampled, dtype=np.int32)
        scored = self._score_prompts(command, rows, hidden_TH)
        if len(sampled) == 0:
            return StepResult(step=command.step, tokens=b"", prompt_logprobs=scored) if self._sampler else None
        logits_RV = self._logits(hidden_TH[step.sampled_token_R])
        if self._sampler is None:
            return None
        assert logits_RV is not None
        drawn = self._sampler.sample(logits_RV, rows.slots_R[sampled], (rows.starts_R + rows.counts_R)[sampled])
        return StepResult(
            step=command.step,
            tokens=drawn.token_R.astype(np.int32).tobytes(),
            errors=drawn.errors,
            logprobs=drawn.logprobs,
            prompt_logprobs=scored,
        )

    def _logits(self, hidden_NH: Tensor) -> Tensor | None:
        """Logits [N, V] on tensor-parallel index 0; None elsewhere."""
        return self._tensor_parallel.gather_columns(self._decoder.logits(hidden_NH), self._widths)

    def _score_prompts(self, command: StepCommand, rows: StepRows, hidden_TH: Tensor) -> dict[int, list[TokenLogprobs]]:
        stops_R = np.cumsum(rows.counts_R)
        scored: dict[int, list[TokenLogprobs]] = {}
        targets = np.frombuffer(command.prompt_targets, dtype=np.int32)
        begin = 0
        for row in command.prompt_logprobs:
            count = int(rows.counts_R[row])
            target, begin = targets[begin : begin + count], begin + count
            target = target[target >= 0]
            first = int(stops_R[row]) - count
            found: list[TokenLogprobs] = []
            for block in range(0, len(target), SCORED_ROWS):
                wanted = target[block : block + SCORED_ROWS]
                logits = self._logits(hidden_TH[first + block :][: len(wanted)])
                if self._sampler is not None and logits is not None:
                    found += self._sampler.score_prompt(logits, wanted, int(rows.slots_R[row]))
            scored[row] = found
        return scored

    def _update_sampler(self, command: StepCommand) -> None:
        if self._sampler is None:
            return
        for slot in command.released:
            self._sampler.remove(slot)
        for new in command.admitted:
            self._sampler.add(new.slot, new.params, new.prompt_len, new.seed)
        slots, positions = StepRows.of(command).tokens_of(slice(None))
        self._sampler.observe(slots, np.frombuffer(command.tokens, dtype=np.int32), positions)

    def forget(self) -> None:
        """Counts from zero again."""
        self._times.clear()
        self._attention_seconds = 0.0
        for link in self._links.values():
            link.bytes_sent = link.bytes_received = 0

    def stats(self) -> RankStats:
        return RankStats(
            rank=self.rank,
            attention_seconds=self._attention_seconds,
            bytes_sent={f"{self.rank}->{peer}": link.bytes_sent for peer, link in self._links.items()},
            bytes_received={f"{peer}->{self.rank}": link.bytes_received for peer, link in self._links.items()},
        )

    def close(self) -> None:
        for link in self._links.values():
            link.close()
