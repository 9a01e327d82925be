"""Breakdown of a decode step's time on a device: the fleet's step, its kernels, and a CUDA graph of its layers.

    python bench/gpu/decode.py --device cuda

For each model and batch size, in one process: milliseconds of a whole step (driver, ranks, sampling); its kernels,
copies and host synchronisations, and the share of it in which the GPU is busy (torch.profiler); the layers alone,
launched kernel by kernel and as one captured graph. The last figure is the lower bound that a graph would give.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu.shapes import Figures, measure_each_model
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hetis.core.plan_sources import resolve_plan
from hetis.core.sampling_params import SamplingParams
from hetis.models.decoder import Decoder
from hetis.models.families import read_model_spec
from hetis.models.loader import load_weights
from hetis_kernels import kv_append, paged_decode
from hetis_kernels.paged_decode import decode_scratch_numel
from tests.engine.local_fleet import LocalFleet

CONTEXT, PAGE = 512, 32
WARM, STEPS = 8, 24
SYNCHRONISING = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


def whole_steps(directory: Path, device: str, batch: int) -> Figures:
    """Figures of whole steps of a fleet in this process."""
    options: dict[str, Any] = {
        "device": device, "dtype": "bfloat16", "load_format": "dummy", "max_num_seqs": batch,
        "max_model_len": CONTEXT + 100, "kv_cache_memory": 64 << 20 if device == "cpu" else 8 << 30,
    }  # fmt: skip
    with LocalFleet(directory, "1+0", **options) as fleet:
        params = SamplingParams(max_tokens=99, temperature=0, ignore_eos=True)
        for row in range(batch):
            fleet.engine.add(fleet.request(str(row), [7 + row] * CONTEXT, params), 0.0)
        while any(s.is_prefilling for s in fleet.engine.scheduler.running) or fleet.engine.scheduler.num_waiting:
            fleet.turn()
        for _ in range(WARM):
            fleet.turn()
        begin = time.perf_counter()
        for _ in range(STEPS):
            fleet.turn()
        step_ms = (time.perf_counter() - begin) / STEPS * 1e3
        found: Figures = {"step ms": round(step_ms, 3)}
        if device == "cuda":
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                for _ in range(STEPS):
                    fleet.turn()
            found |= per_step(profiled, step_ms)
    return found


def per_step(profiled: profile, step_ms: float) -> Figures:
    kernels = copies = synchronisations = 0
    busy_us = 0.0
    for event in profiled.events() or ():  # type: ignore[no-untyped-call]
        name = str(event.name)
        if event.device_type == DeviceType.CUDA:
            copies += name.startswith(("Memcpy", "Memset"))
            kernels += not name.startswith(("Memcpy", "Memset"))
            busy_us += event.time_range.elapsed_us()
        synchronisations += name in SYNCHRONISING
    return {
        "kernels": round(kernels / STEPS, 1),
        "copies": round(copies / STEPS, 1),
        "synchronisations": round(synchronisations / STEPS, 1),
        "busy": f"{busy_us / STEPS / 1e3 / step_ms:.0%}",
    }


class _Reduce:
    size = 1

    def all_reduce(self, x: Tensor) -> None: ...


class _PlainAttention:
    """Append and decode over static index tensors, as a graph needs them: lane = qkv index = token x group."""

    def __init__(self, num_layers: int, batch: int, groups: int, queries: int, head_dim: int, device: str) -> None:
        width = CONTEXT // PAGE
        lanes = batch * groups
        shape = (num_layers, 2, lanes * width, PAGE, head_dim)
        self.pool_L2PSD = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.table_BW = torch.randperm(lanes * width, device=device).int().view(lanes, width)
        self.lane_U = torch.arange(lanes, dtype=torch.int32, device=device)
        self.length_U = torch.full((lanes,), CONTEXT, dtype=torch.int32, device=device)
        last = (CONTEXT - 1) % PAGE
        self.cell_U = self.table_BW[:, -1].long() * PAGE + last
        self.scratch = torch.empty(decode_scratch_numel(lanes, queries, head_dim, CONTEXT), device=device)

    def attend(self, layer: int, qkv_TGHD: Tensor, out_TGMD: Tensor) -> None:
        qkv_NHD, out_NMD = qkv_TGHD.flatten(0, 1), out_TGMD.flatten(0, 1)
        pages, M = self.pool_L2PSD[layer], out_NMD.shape[1]
        kv_append(qkv_NHD[:, M], qkv_NHD[:, M + 1], pages, self.lane_U, self.cell_U)
        paged_decode(
            qkv_NHD[:, :M], pages, self.table_BW, self.lane_U, self.lane_U, self.length_U, 0.1, 0, out_NMD,
            max_length=CONTEXT, scratch=self.scratch,
        )  # fmt: skip


def layers_alone(directory: Path, device: str, batch: int) -> Figures:
    spec, place = read_model_spec(directory), torch.device(device)
    plan = resolve_plan("1+0", spec, device, None)
    weights = load_weights(spec, plan, 0, 0, directory, torch.bfloat16, place, load_format="dummy")
    decoder = Decoder(spec, weights, _Reduce(), max_tokens=batch, max_position=CONTEXT + 1, device=place)
    attention = _PlainAttention(
        spec.num_layers, batch, spec.num_head_groups, spec.queries_per_group, spec.head_dim, device
    )
    hidden_TH = torch.ones(batch, spec.hidden_size, dtype=torch.bfloat16, device=place)
    position_T = torch.full((batch,), CONTEXT - 1, device=place)

    def forward() -> None:
        decoder.forward(hidden_TH.fill_(1.0), position_T, attention)

    with torch.inference_mode():
        found = {"layers ms": timed_ms(forward, device)}
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                forward()
            found["layers as a graph ms"] = timed_ms(graph.replay, device)
    return found


def timed_ms(call: Callable[[], None], device: str) -> float:
    for _ in range(WARM):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(STEPS):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return round((time.perf_counter() - begin) / STEPS * 1e3, 3)


def measure(directory: Path, device: str, batches: tuple[int, ...]) -> Iterator[Figures]:
    for batch in batches:
        found = whole_steps(directory, device, batch) | layers_alone(directory, device, batch)
        yield {f"x{batch} {what}": figure for what, figure in found.items()}


if __name__ == "__main__":
    measure_each_model(__doc__, measure)
