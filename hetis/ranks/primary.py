"""A primary: the weights of its shard, and its part of every step.

A step on a primary:  embed or receive, layers (with split attention), then send on, or logits and sample.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from hetis.comm.collectives import Pipeline, TensorParallel
from hetis.comm.links.base import Link
from hetis.core.device_info import RankStats
from hetis.core.messages import Setup, StepResult, StepTimes
from hetis.core.messages.step_command import Step
from hetis.core.step_times import Activity
from hetis.core.token_logprobs import SCORED_ROWS, TokenLogprobs
from hetis.models.decoder import Decoder
from hetis.ranks.build import TORCH_DTYPES, decode_scratch, make_pool, wire_format
from hetis.ranks.measuring.devices import Measurer
from hetis.ranks.page_transfer import HomeTransfers
from hetis.ranks.sampling.sampler import Sampler
from hetis.ranks.split_attention import SplitAttention
from hetis.ranks.step_input import PrimaryInput, StepPlanner
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
        self._widths = [primary.num_vocab_rows for primary in stage.primaries]
        self._workers = list(setup.plan.worker_ranks)
        first, stop = self._primary.groups
        scratch = decode_scratch(setup, stop - first, device)
        pool, windows = make_pool(setup, rank, self._stage_index, device), setup.spec.windows[slice(*stage.layers)]
        uses_flash = flash_serves(device, TORCH_DTYPES[setup.dtype], setup.spec.head_dim)
        # on CPUs there is no choice
        level = logging.INFO if device.type == "cuda" else logging.DEBUG
        _log.log(level, "attention of prompts by %s", prompt_attention(uses_flash))
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
        self.last_step = -1  # that it has finished
        self._device = device
        # last token that was drawn for each slot; on the sampling rank
        self._drawn_B = np.zeros(setup.max_num_seqs, dtype=np.int64)
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
    def run_step(self, step: Step) -> StepResult | None:
        """One step; the sampling rank returns its tokens."""
        step = self._with_own_tokens(step)  # before the step's time begins: others wait here for the sampling rank
        self._timer.begin()
        self._planner.apply(step)
        self._update_sampler(step)
        inputs = self._planner.primary_input(step, self._primary.groups, self._workers)
        self._transfers.begin(step)
        self._planner.upload()
        self._attention.begin(inputs)
        result = self._compute(step, inputs) if step.num_tokens else self._exchange_pages(step)
        self._note_times(step, inputs)
        self.last_step = step.number
        return result

    def _with_own_tokens(self, step: Step) -> Step:
        """The step with the tokens that the driver did not know: the sampling rank has them, others get them."""
        if len(step.yours_N) == 0:
            return step
        assert self._is_first, "micro-batches of several stages have no token in flight"
        token_N = torch.from_numpy(self._drawn_B[step.slot_T[step.yours_N]]).to(self._device)
        self._tensor_parallel.broadcast(token_N)
        return step.with_yours(token_N.cpu().numpy())

    def _compute(self, step: Step, inputs: PrimaryInput) -> StepResult | None:
        if self._is_first:
            hidden_TH = self._decoder.embed(inputs.token_T, inputs.position_T)
            self._timer.lap(Activity.OTHER)
        else:
            self._timer.lap(Activity.OTHER)
            hidden_TH = self._pipeline.recv(inputs.num_tokens)
            self._timer.lap(Activity.STAGE)
        hidden_TH = self._decoder.forward(hidden_TH, inputs.position_T, self._attention)
        self._timer.lap(Activity.DENSE)
        if self._is_last:
            return self._finish(step, inputs, hidden_TH)
        self._timer.lap(Activity.OTHER)
        self._pipeline.send(hidden_TH)
        self._timer.lap(Activity.STAGE)
        return None

    def _exchange_pages(self, step: Step) -> StepResult | None:
        """A step without tokens: all sequences wait for pages that migrations will free."""
        self._timer.lap(Activity.OTHER)
        for layer in range(self._decoder.num_layers):
            self._transfers.exchange(layer)
        return StepResult(step=step.number, tokens=[]) if self._sampler else None

    def _note_times(self, step: Step, inputs: PrimaryInput) -> None:
        self._timer.lap(Activity.OTHER)
        times = self._timer.report([inputs.local], self._transfers.num_pages * self._decoder.num_layers)
        self._attention_seconds += attention_seconds(times)
        self._times.append(step_times(self.rank, step, [times]))

    def take_times(self) -> list[StepTimes]:
        """Times of the steps that were finished since the last call."""
        times, self._times = self._times, []
        return times

    def _finish(self, step: Step, inputs: PrimaryInput, hidden_TH: Tensor) -> StepResult | None:
        """Logits of the sampling rows (and of prompts to be scored), on the sampling rank their tokens."""
        row_I = step.sampling_row_I
        scored = self._score_prompts(step, hidden_TH)
        if len(row_I) == 0:
            return StepResult(step=step.number, tokens=[], prompt_logprobs=scored) if self._sampler else None
        logits_IV = self._logits(hidden_TH[inputs.last_token_I])
        if self._sampler is None:
            return None
        assert logits_IV is not None
        slot_I = step.slot_R[row_I]
        sampled = self._sampler.sample(logits_IV, slot_I, (step.start_R + step.count_R)[row_I])
        self._drawn_B[slot_I] = sampled.token_R
        return StepResult(
            step=step.number,
            tokens=sampled.token_R.tolist(),
            errors=sampled.errors,
            logprobs=sampled.logprobs,
            prompt_logprobs=scored,
        )

    def _logits(self, hidden_NH: Tensor) -> Tensor | None:
        """Logits [N, V] on tensor-parallel index 0; None elsewhere."""
        return self._tensor_parallel.gather_columns(self._decoder.logits(hidden_NH), self._widths)

    def _score_prompts(self, step: Step, hidden_TH: Tensor) -> dict[int, list[TokenLogprobs]]:
        """Log-probabilities of the prompt targets, by row; empty lists on ranks that do not sample."""
        scored: dict[int, list[TokenLogprobs]] = {}
        for row, target_N in step.prompt_targets.items():
            first = int(step.token_stop_R[row] - step.count_R[row])
            found: list[TokenLogprobs] = []
            for block in range(0, len(target_N), SCORED_ROWS):
                wanted = target_N[block : block + SCORED_ROWS]
                logits = self._logits(hidden_TH[first + block :][: len(wanted)])
                if self._sampler is not None and logits is not None:
                    found += self._sampler.score_prompt(logits, wanted, int(step.slot_R[row]))
            scored[row] = found
        return scored

    def _update_sampler(self, step: Step) -> None:
        if self._sampler is None:
            return
        for slot in step.released:
            self._sampler.remove(slot)
        for new in step.admitted:
            self._sampler.add(new.slot, new.params, new.prompt_len, new.seed)
        self._sampler.observe(step.slot_T, step.token_T, step.position_T)

    def forget(self) -> None:
        """Resets counters and times, as if there had been no step."""
        self._times.clear()
        self._attention_seconds, self.last_step = 0.0, -1
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
