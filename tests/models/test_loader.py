"""Loading of weights: exact slices, bounded memory, and an error of one sentence for every broken checkpoint."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hetis.core.plan import Plan
from hetis.core.plan_sources import split_evenly
from hetis.cost.footprint import weight_bytes
from hetis.models.families import read_model_spec
from hetis.models.layers import StageWeights
from hetis.models.loader import load_weights
from hetis_kernels.linear import PackedLinear, weight_rows
from tests.checkpoints import make_checkpoint
from tests.models.reference import CPU, decode_all, tensors_of
from tests.models.test_decoder import sparse, uneven

TOKENS = [3, 99, 2, 330, 17]


def load(
    directory: Path,
    plan: Plan | str = "1+0",
    stage: int = 0,
    rank: int = 0,
    load_format: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> StageWeights:
    spec = read_model_spec(directory)
    plan = split_evenly(plan, spec) if isinstance(plan, str) else plan
    return load_weights(spec, plan, stage, rank, directory, dtype, CPU, load_format)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama3")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("opt"), "opt")


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "copy"))


def change(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Rewrites the tensors of a copied checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


# --- what is read -----------------------------------------------------------------------------------------------------


def test_fused_layouts(llama: Path) -> None:
    """QKV has query heads, key and value per group; gate precedes up; shards are slices of the whole."""
    spec, tensors = read_model_spec(llama), load_file(llama / "model.safetensors")
    q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    weights = load(llama, "2+0", rank=1).layers[1]
    depth, queries = spec.head_dim, spec.queries_per_group
    expected = torch.cat((q[queries * depth :], k[depth:], v[depth:]))
    torch.testing.assert_close(dense(weights.qkv), expected, rtol=0, atol=0)
    gate, up = (tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    torch.testing.assert_close(dense(weights.gate_up), torch.cat((gate[102:], up[102:])), rtol=0, atol=0)
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(dense(weights.down), down[:, 102:], rtol=0, atol=0)


def dense(packed: PackedLinear) -> Tensor:
    weight_NK = packed.weight.new_empty(packed.num_outputs, packed.num_inputs)
    weight_rows(packed, torch.arange(packed.num_outputs), weight_NK)
    return weight_NK


def test_row_parallel_biases_are_held_once(opt: Path) -> None:
    first, second = (load(opt, "2+0", rank=rank).layers[0] for rank in range(2))
    assert first.output.bias is not None
    assert first.down.bias is not None
    assert second.output.bias is None
    assert second.down.bias is None
    assert second.qkv.bias is not None


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "opt", "mqa"])
def test_the_ledger_counts_exactly_the_loaded_weights(tmp_path: Path, family: str) -> None:
    directory = make_checkpoint(tmp_path, family)
    spec = read_model_spec(directory)
    for plan in (uneven(spec, 2), sparse(spec)):
        for stage_index, stage in enumerate(plan.stages):
            for tp_index, primary in enumerate(stage.primaries):
                weights = load(directory, plan, stage_index, tp_index, dtype=torch.bfloat16)
                unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(weights) if tensor.nbytes}
                assert sum(unique.values()) == weight_bytes(spec, plan, primary, "bfloat16")
    whole = load(directory, dtype=torch.bfloat16)
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(whole)}
    alone = split_evenly("1+0", spec, "cpu")
    assert sum(unique.values()) == weight_bytes(spec, alone, alone.primaries[0], "bfloat16")


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    weights = load(make_checkpoint(tmp_path, "qwen3"))
    assert weights.head is not None
    assert weights.embedding is not None
    assert weights.head is weights.embedding


def test_conversion_to_another_dtype_rounds_once(llama: Path) -> None:
    exact, rounded = load(llama), load(llama, dtype=torch.float16)
    torch.testing.assert_close(dense(rounded.layers[0].qkv), dense(exact.layers[0].qkv).half(), rtol=0, atol=0)
    assert {tensor.dtype for tensor in tensors_of(rounded)} == {torch.float16}


def test_many_files_with_an_index(llama: Path, tmp_path: Path) -> None:
    directory = copy(llama, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for part in range(3):
        file = f"model-0000{part + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[part::3]}, directory / file)
        weight_map |= dict.fromkeys(names[part::3], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({"other": torch.ones(1)}, directory / "unrelated.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(load(llama)), tensors_of(load(directory)), strict=True))


def test_names_without_prefix_and_ignored_tensors(opt: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"].clone()
        tensors["decoder.version"] = torch.tensor([3.0])

    directory = change(copy(opt, tmp_path), edit)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(load(opt)), tensors_of(load(directory)), strict=True))


def test_a_tied_checkpoint_may_hold_the_head_alone(opt: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.decoder.embed_tokens.weight")

    directory = change(copy(opt, tmp_path), edit)
    assert torch.equal(dense(load(opt).embedding), dense(load(directory).embedding))  # type: ignore[arg-type]


def test_progress_is_reported_by_layer(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    spec = read_model_spec(llama)
    plan = uneven(spec, 2)
    load_weights(
        spec, plan, 1, 0, llama, torch.float32, CPU, show_progress=True, on_progress=lambda *now: seen.append(now)
    )
    assert seen == [(1, 2), (2, 2)]


# --- memory -----------------------------------------------------------------------------------------------------------

_MEASURE = """
import sys
from pathlib import Path
import torch
from hetis.core.plan_sources import split_evenly
from hetis.models.families import read_model_spec
from hetis.models.loader import load_weights
from tests.models.reference import tensors_of

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

directory, plan, dtype, load_format = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3]), sys.argv[4]
spec = read_model_spec(directory)
torch.empty(1).normal_()
open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
before = status("VmRSS")
weights = load_weights(spec, split_evenly(plan, spec), 0, 0, directory, dtype, torch.device("cpu"), load_format)
peak = status("VmHWM") - before
print(peak, sum({t.data_ptr(): t.nbytes for t in tensors_of(weights)}.values()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 MB of float32; the largest tensor is the embedding, 32 MB."""
    directory = tmp_path_factory.mktemp("large")
    make_checkpoint(
        directory,
        "llama2",
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=8192,
        num_hidden_layers=3,
    )
    return directory


@pytest.mark.parametrize(
    ("plan", "dtype", "load_format"),
    [("1+0", "float32", "auto"), ("2+0", "float32", "auto"), ("2+0", "bfloat16", "auto"), ("1+0", "float32", "dummy")],
)
def test_peak_memory_is_what_is_kept_and_the_largest_tensor(
    large: Path, plan: str, dtype: str, load_format: str
) -> None:
    command = [sys.executable, "-c", _MEASURE, str(large), plan, dtype, load_format]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, kept = map(int, result.stdout.split())
    largest = 8192 * 1024 * 4
    table = 2 * 2**21 * 4 if load_format == "dummy" else 0  # of random values that dummy weights are copied from
    assert peak <= kept + largest + table + 8 * 2**20  # a few megabytes for code that is touched for the first time
    assert peak >= kept


# --- dummy weights ----------------------------------------------------------------------------------------------------


def test_dummy_weights_need_no_files_and_do_not_depend_on_the_split(tmp_path: Path, llama: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    spec = read_model_spec(tmp_path)
    one = decode_all(spec, split_evenly("1+0", spec), tmp_path, TOKENS, load_format="dummy")
    for plan in (split_evenly("2+0", spec), uneven(spec, 2)):
        other = decode_all(spec, plan, tmp_path, TOKENS, load_format="dummy")
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4)
    assert one.std() > 0.01
    assert one.isfinite().all()


def test_dummy_weights_repeat_with_the_seed(llama: Path) -> None:
    spec = read_model_spec(llama)

    def qkv(seed: int) -> Tensor:
        plan = split_evenly("1+0", spec)
        return dense(load_weights(spec, plan, 0, 0, llama, torch.float32, CPU, "dummy", seed).layers[2].qkv)

    assert torch.equal(qkv(5), qkv(5))
    assert not torch.equal(qkv(5), qkv(6))
    assert qkv(5).std().item() == pytest.approx(0.02, rel=0.05)


# --- what is refused --------------------------------------------------------------------------------------------------


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensors.pop(name)].clear()


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), ["model.layers.1.mlp.up_proj.weight", "download"]),
        (drop("lm_head.weight"), ["no tensor lm_head.weight", "download"]),
        (lambda tensors: tensors.clear(), ["and 50 more"]),
        (
            put("model.layers.3.mlp.up_proj.weight", torch.ones(203, 128)),
            ["model.layers.3.mlp.up_proj.weight", "config"],
        ),
        (put("extra.weight", torch.ones(3)), ["model.safetensors", "extra.weight", "config.json"]),
        (put("model.norm.weight", torch.ones(129)), ["model.safetensors", "model.norm.weight", "[129]", "[128]"]),
        (put("model.norm.weight", torch.ones(1, 128)), ["[1, 128]", "[128]"]),
        (put("model.norm.weight", torch.ones(128, dtype=torch.int8)), ["model.norm.weight", "I8", "unquantised"]),
    ],
)
def test_wrong_tensors_are_refused(
    llama: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], words: list[str]
) -> None:
    assert_refused(change(copy(llama, tmp_path), edit), words)


def assert_refused(directory: Path, words: list[str], **arguments: Any) -> None:
    with pytest.raises(ValueError) as refused:
        load(directory, **arguments)
    message = str(refused.value)
    assert all(word in message for word in [*words, str(directory)]), message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize("kept", [0, 4, 100, 100_000])
def test_truncated_files_are_refused(llama: Path, tmp_path: Path, kept: int) -> None:
    directory = copy(llama, tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert_refused(directory, ["model.safetensors", "truncated", "download"])


def test_pickled_checkpoints_are_refused(llama: Path, tmp_path: Path) -> None:
    directory = copy(llama, tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert_refused(directory, ["pytorch_model.bin", "never unpickles", "save_pretrained"])
    (directory / "pytorch_model.bin").unlink()
    assert_refused(directory, ["no *.safetensors"])


def test_a_missing_part_is_refused(llama: Path, tmp_path: Path) -> None:
    directory = copy(llama, tmp_path)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}))
    assert_refused(directory, ["model-00002-of-00002.safetensors", "does not exist"])


def test_a_tensor_in_two_files_is_refused(llama: Path, tmp_path: Path) -> None:
    directory = copy(llama, tmp_path)
    save_file({"model.norm.weight": torch.ones(128)}, directory / "second.safetensors")
    assert_refused(directory, ["model.norm.weight", "second.safetensors", "both"])


def test_the_wrong_config_is_refused(llama: Path, tmp_path: Path) -> None:
    directory = copy(llama, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    assert_refused(directory, ["self_attn", "bias", "config.json"])


def test_unknown_load_formats_are_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"load_format 'pt' is unknown; use one of auto, safetensors, dummy"):
        load(llama, load_format="pt")
