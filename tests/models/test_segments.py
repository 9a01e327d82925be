"""Native segments of the layer loop give the bits of separate operators."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hetis.core.plan import Plan
from hetis.core.plan_sources import split_evenly
from hetis.models import segments
from hetis.models.decoder import Decoder
from hetis.models.families import read_model_spec
from hetis.models.loader import load_weights
from hetis_kernels.dispatch import cpu_op
from hetis_kernels.layer_segments import native_segments
from tests.checkpoints import make_checkpoint
from tests.models.reference import CPU, FullAttention, SumOverThreads, run_threads

MAX_TOKENS = 700  # more than one slab of the linear kernel
needs_kernel = pytest.mark.skipif(cpu_op("linear") is None, reason="the C++ extension is not built")


def residual_stream(directory: Path, plan: Plan, dtype: torch.dtype, num_tokens: int, num_layers: int | None) -> Tensor:
    """[ranks, T, H] after `num_layers` layers of random weights, on every rank of the first stage."""
    spec, num_ranks = read_model_spec(directory), len(plan.stages[0].primaries)
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TH = torch.randn(num_tokens, spec.hidden_size, generator=generator).to(dtype)
    position_T = torch.arange(num_tokens) % 60
    group, found = SumOverThreads(num_ranks), [torch.empty(0)] * num_ranks

    def work(rank: int) -> None:
        weights = load_weights(spec, plan, 0, rank, directory, dtype, CPU, "dummy")
        decoder = Decoder(spec, weights, group.of(rank), max_tokens=MAX_TOKENS, device=CPU)
        for count in (1, num_tokens):  # buffers hold values of another step
            found[rank] = hidden_TH[:count].clone()
            decoder.forward(found[rank], position_T[:count], FullAttention(spec, 0), num_layers=num_layers)

    run_threads(group, work, num_ranks)
    return torch.stack(found)


@needs_kernel
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama3", "mqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_native_segments_give_the_bits_of_separate_operators(
    tmp_path: Path, family: str, dtype: torch.dtype, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, threads = make_checkpoint(tmp_path, family), torch.get_num_threads()
    spec = read_model_spec(directory)
    plans = [split_evenly("1+0", spec), split_evenly("2+0", spec)] if spec.num_head_groups > 1 else []
    torch.set_num_threads(num_threads)
    try:
        for plan in plans or [split_evenly("1+0", spec)]:
            for num_tokens, num_layers in ((1, None), (2, 1), (19, 2), (MAX_TOKENS, None)):
                arguments = directory, plan, dtype, num_tokens, num_layers
                native = residual_stream(*arguments)
                with monkeypatch.context() as patched:
                    patched.setattr(segments, "serves", lambda *linears: 0)
                    separate = residual_stream(*arguments)
                assert torch.isfinite(separate.float()).all()
                assert torch.equal(native, separate)
    finally:
        torch.set_num_threads(threads)


@needs_kernel
def test_all_threads_work_on_layers_of_some_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path, "qwen3", hidden_size=512, intermediate_size=1000)
    arguments = directory, split_evenly("1+0", read_model_spec(directory)), torch.bfloat16
    native = [residual_stream(*arguments, count, None) for count in (1, 5, MAX_TOKENS)]
    monkeypatch.setattr(segments, "serves", lambda *linears: 0)
    for found, count in zip(native, (1, 5, MAX_TOKENS), strict=True):
        assert torch.equal(found, residual_stream(*arguments, count, None))


@needs_kernel
def test_wrong_tensors_are_refused() -> None:
    def buffers(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        shapes = [(4, 8), (4, 8), (4, 2, 3, 4), (4, 2, 1, 4), (4, 12), (4, 6)]
        return [torch.zeros(shape, dtype=dtype) for shape in shapes]

    table_PR = torch.zeros(5, 4)
    with pytest.raises(ValueError, match="unknown activation"):
        native_segments("swish", 1e-6, None, buffers())
    with pytest.raises(ValueError, match="six buffers"):
        native_segments("silu", 1e-6, None, buffers()[:5])
    made = native_segments("silu", 1e-6, table_PR, buffers())
    with pytest.raises(ValueError, match="no step"):
        made.run(0, 1)
    with pytest.raises(ValueError, match="12 tensors"):
        made.add_layer([None])
    with pytest.raises(ValueError, match="too many"):
        made.begin(torch.zeros(5, 8), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="hidden is"):
        made.begin(torch.zeros(2, 7), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(IndexError, match="outside the table"):
        made.begin(torch.zeros(2, 8), torch.tensor([0, 5]))
    made.begin(torch.zeros(2, 8), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="parts 0 to 1 of 0 layers"):
        made.run(0, 1)
