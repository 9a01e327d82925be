"""Checkpoints with damaged or missing files are refused in the front end, before a process starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hetis import LLM, SamplingParams
from hetis.core.config import EngineConfig
from hetis.launch import checks, fleet
from hetis.launch.checks import plan_for
from hetis.models.hub import PACKAGED
from hetis.models.weight_files import INDEX


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGED, tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", '{"rms_norm_eps": "1e-05"}', ["config.json", "rms_norm_eps", "1e-05"]),
        ("config.json", '{"num_hidden_layers": 1e400}', ["config.json", "num_hidden_layers", "Infinity"]),
        ("generation_config.json", "[2]", ["generation_config.json", "not a JSON object"]),
        ("generation_config.json", "{", ["generation_config.json", "cannot be read"]),
        (INDEX, '{"weight_map": 1}', [INDEX, "weight_map is 1"]),
        (INDEX, '{"weight_map": {"a": "b.safetensors"}}', [INDEX, "b.safetensors"]),
        ("model.safetensors", "text", ["model.safetensors", "damaged"]),
        ("model.safetensors", None, ["no *.safetensors"]),
    ],
)
def test_a_broken_file_is_refused_before_a_process_starts(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, words: list[str]
) -> None:
    def start(*_: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(fleet, "_start_agent", start)
    if content is None:
        (model / name).unlink()
    elif name == "config.json":
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(config | json.loads(content)))
    else:
        (model / name).write_text(content)
    with pytest.raises(ValueError) as refused:
        LLM(model, device="cpu")
    assert all(word in str(refused.value) for word in [str(model), *words]), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tied", "load_format", "fetched"), [(True, "auto", True), (False, "auto", False), (True, "dummy", False)]
)
def test_weights_of_a_tied_model_are_fetched_before_a_process_starts(
    model: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, load_format: Any, fetched: bool
) -> None:
    """The memory depends on whether the LM head is the embedding, which only the weights tell."""
    asked: list[bool] = []

    def resolve(name: str, revision: str | None, weights: bool = True) -> Path:
        asked.append(weights)
        return model

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    monkeypatch.setattr(checks, "resolve_model", resolve)
    plan_for(EngineConfig(model="organisation/model", load_format=load_format, device="cpu"))
    assert asked == [False, True] if fetched else [False]


def test_dummy_weights_need_no_files(model: Path) -> None:
    (model / "model.safetensors").unlink()
    directory, spec, _ = plan_for(EngineConfig(model=str(model), load_format="dummy", device="cpu"))
    assert (directory, spec.num_layers > 0) == (model, True)


def test_a_fleet_uses_a_head_that_differs_from_the_embedding(model: Path) -> None:
    """With the embedding in reverse order as head, the ids of the best tokens are mirrored."""
    path = model / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, path)
    best = []
    for directory in (PACKAGED, model):
        with LLM(directory, device="cpu", dtype="float32", kv_cache_memory="16MiB") as llm:
            outputs = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
        best += outputs[0].outputs[0].token_ids
    assert sum(best) == llm.vocab_size - 1
