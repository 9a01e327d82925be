"""Decoders in tests without workers: plain attention over whole sequences, and tensor parallelism in threads."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from threading import Barrier, Thread

import torch
from torch import Tensor

from hetis.core.model_spec import ModelSpec
from hetis.core.plan import Plan
from hetis.models.decoder import Decoder
from hetis.models.layers import StageWeights
from hetis.models.loader import load_weights
from tests.processes.look import DEADLINE

CPU = torch.device("cpu")


class FullAttention:
    """Causal attention (with the layers' windows) of one whole sequence, in float32."""

    def __init__(self, spec: ModelSpec, first_layer: int) -> None:
        self._spec, self._first_layer = spec, first_layer

    def attend(self, layer: int, qkv_TGHD: Tensor, out_TGMD: Tensor) -> None:
        queries, num_tokens = self._spec.queries_per_group, qkv_TGHD.shape[0]
        q, k, v = qkv_TGHD[:, :, :queries], qkv_TGHD[:, :, queries], qkv_TGHD[:, :, queries + 1]
        score = torch.einsum("tgmd,sgd->gmts", q.float(), k.float()) * self._spec.attention_scale
        distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
        window = self._spec.windows[self._first_layer + layer] or num_tokens
        score.masked_fill_((distance < 0) | (distance >= window), -torch.inf)
        out_TGMD.copy_(torch.einsum("gmts,sgd->tgmd", score.softmax(dim=-1), v.float()))


class SumOverThreads:
    """All-reduce among the threads of one stage, in rank order, so that runs are reproducible."""

    def __init__(self, num_ranks: int) -> None:
        self.size = num_ranks
        self._barrier, self._parts = Barrier(num_ranks, timeout=DEADLINE), [torch.empty(0)] * num_ranks

    def of(self, rank: int) -> "RankOfThreads":
        return RankOfThreads(self, rank)

    def reduce(self, rank: int, x: Tensor) -> None:
        self._parts[rank] = x.clone()
        self._barrier.wait()
        x.copy_(sum(self._parts[1:], start=self._parts[0]))
        self._barrier.wait()

    def abort(self) -> None:
        self._barrier.abort()


class RankOfThreads:
    def __init__(self, group: SumOverThreads, rank: int) -> None:
        self._group, self._rank, self.size = group, rank, group.size

    def all_reduce(self, x: Tensor) -> None:
        self._group.reduce(self._rank, x)


def run_threads(group: SumOverThreads, work: Callable[[int], None], num_ranks: int) -> None:
    """Runs work(rank) for all ranks concurrently; raises the first error of a thread."""
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            with torch.inference_mode():
                work(rank)
        except BaseException as error:
            errors.append(error)
            group.abort()

    threads = [Thread(target=guarded, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def decode_all(
    spec: ModelSpec,
    plan: Plan,
    directory: Path,
    token_ids: list[int],
    dtype: torch.dtype = torch.float32,
    load_format: str = "auto",
) -> Tensor:
    """Logits [T, V] of one sequence through all stages and shards of the plan."""
    hidden_TH = torch.empty(0)
    for stage_index in range(len(plan.stages)):
        shards = [
            load_weights(spec, plan, stage_index, tp_index, directory, dtype, CPU, load_format)
            for tp_index in range(len(plan.stages[stage_index].primaries))
        ]
        hidden_TH, logits_TV = run_stage(spec, shards, hidden_TH, torch.tensor(token_ids))
    return logits_TV


def run_stage(spec: ModelSpec, shards: list[StageWeights], hidden_TH: Tensor, token_T: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states after the stage, logits if it is the last one), with all shards in parallel."""
    position_T = torch.arange(len(token_T))
    group = SumOverThreads(len(shards))
    hidden = [hidden_TH.clone() for _ in shards]
    logits = [torch.empty(0) for _ in shards]

    def work(rank: int) -> None:
        weights = shards[rank]
        decoder = Decoder(spec, weights, group.of(rank), max_tokens=len(token_T) + 3, device=CPU)
        if weights.embedding is not None:
            hidden[rank] = decoder.embed(token_T, position_T)
        attention = FullAttention(spec, weights.stage.layers[0])
        hidden[rank] = decoder.forward(hidden[rank], position_T, attention)
        if weights.head is not None:
            logits[rank] = decoder.logits(hidden[rank])

    run_threads(group, work, len(shards))
    return hidden[0], torch.cat(logits, dim=1) if shards[0].head is not None else torch.empty(0)


def tensors_of(part: object) -> list[Tensor]:
    """All tensors in dataclasses and tuples."""
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, tuple):
        return [tensor for element in part for tensor in tensors_of(element)]
    if is_dataclass(part):
        return [tensor for field in fields(part) for tensor in tensors_of(getattr(part, field.name))]
    return []
