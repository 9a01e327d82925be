"""Tensors of a checkpoint: LM heads that differ from the embedding that config.json ties, and malformed indexes."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hetis.core.plan_sources import split_evenly
from hetis.core.sampling_params import SamplingParams
from hetis.cost.footprint import weight_bytes
from hetis.models.families import read_model_spec
from hetis.models.loader import load_weights
from hetis.models.weight_files import INDEX, find_tensors, with_own_head
from tests.checkpoints import greedy_reference, load_reference, make_checkpoint, reference_logits
from tests.engine.local_fleet import LocalFleet
from tests.models.reference import CPU, decode_all, tensors_of
from tests.models.test_decoder import PROMPT, uneven

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NUM_PARTS = 3


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied checkpoint whose embedding spans several blocks of the comparison."""
    directory = tmp_path_factory.mktemp("tied")
    return make_checkpoint(directory, "qwen3", vocab_size=5000, num_hidden_layers=2)


def with_head(tied: Path, directory: Path, head: Tensor | None, num_files: int = 1) -> Path:
    """The checkpoint with an LM head beside the embedding, in one file, or in several with an index."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tied / name, directory)
    tensors = load_file(tied / "model.safetensors") | ({} if head is None else {HEAD: head})
    if num_files == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map: dict[str, str] = {}
    for part in range(num_files):
        file = f"model-{part + 1:05}-of-{num_files:05}.safetensors"
        names = sorted(tensors)[part::num_files]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    assert weight_map.get(HEAD) != weight_map[EMBEDDING]
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


def embedding_of(tied: Path) -> Tensor:
    return load_file(tied / "model.safetensors")[EMBEDDING]


@pytest.mark.parametrize("num_files", [1, NUM_PARTS])
def test_a_head_that_differs_is_used_by_every_shard(
    tied: Path, tmp_path: Path, num_files: int, caplog: pytest.LogCaptureFixture
) -> None:
    head = embedding_of(tied).flip(0).contiguous()
    directory = with_head(tied, tmp_path, head, num_files)
    with caplog.at_level(logging.WARNING):
        spec = with_own_head(read_model_spec(directory), directory)
    assert not spec.tied_embeddings
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{directory / 'config.json'} says tie_word_embeddings, but tensor lm_head.weight differs from "
        f"model.embed_tokens.weight: it is used as the LM head."
    )
    expected_TV = reference_logits(load_reference(directory), PROMPT)
    for plan in (split_evenly("1+0", spec), uneven(spec, 1), uneven(spec, 2)):
        logits_TV = decode_all(spec, plan, directory, PROMPT)
        torch.testing.assert_close(logits_TV, expected_TV, rtol=0, atol=1e-4)


def test_the_ledger_counts_a_head_of_its_own(tied: Path, tmp_path: Path) -> None:
    directory = with_head(tied, tmp_path, embedding_of(tied) + 1)
    spec = with_own_head(read_model_spec(directory), directory)
    for plan in (split_evenly("1+0", spec, "cpu"), uneven(spec, 1)):
        for tp_index, primary in enumerate(plan.primaries):
            weights = load_weights(spec, plan, 0, tp_index, directory, torch.float32, CPU)
            unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(weights)}
            assert sum(unique.values()) == weight_bytes(spec, plan, primary, "float32")


def test_a_fleet_generates_with_the_head_that_differs(tied: Path, tmp_path: Path) -> None:
    directory = with_head(tied, tmp_path, embedding_of(tied).flip(0).contiguous())
    with LocalFleet(directory, "2+1") as fleet:
        (found,) = fleet.generate([PROMPT], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    assert found.token_ids == greedy_reference(load_reference(directory), PROMPT, 8)


def test_equal_values_stay_tied_in_memory(tied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = with_head(tied, tmp_path, embedding_of(tied).clone(), NUM_PARTS)
    spec = with_own_head(read_model_spec(directory), directory)
    assert spec.tied_embeddings
    assert not caplog.records
    weights = load_weights(spec, split_evenly("1+0", spec), 0, 0, directory, torch.float32, CPU)
    assert weights.head is not None
    assert weights.embedding is not None
    assert weights.head is weights.embedding


@pytest.mark.parametrize("place", [(0, 0), (2500, 64), (4999, 127)])
def test_a_head_that_differs_in_one_value_is_used(tied: Path, tmp_path: Path, place: tuple[int, int]) -> None:
    head = embedding_of(tied).clone()
    head[place] += 1
    directory = with_head(tied, tmp_path, head)
    assert not with_own_head(read_model_spec(directory), directory).tied_embeddings


def test_a_head_of_another_dtype_is_used(tied: Path, tmp_path: Path) -> None:
    directory = with_head(tied, tmp_path, embedding_of(tied).half())
    spec = with_own_head(read_model_spec(directory), directory)
    assert not spec.tied_embeddings
    expected_TV = reference_logits(load_reference(directory), PROMPT)
    logits_TV = decode_all(spec, split_evenly("1+0", spec), directory, PROMPT)
    torch.testing.assert_close(logits_TV, expected_TV, rtol=0, atol=1e-4)


def test_either_tensor_alone_serves_as_both(tied: Path, tmp_path: Path) -> None:
    for name in ("embedding", "head"):
        (tmp_path / name).mkdir()
    alone = with_head(tied, tmp_path / "embedding", None)
    tensors = load_file(alone / "model.safetensors")
    other = with_head(tied, tmp_path / "head", None)
    save_file({HEAD if name == EMBEDDING else name: tensors[name] for name in tensors}, other / "model.safetensors")
    for directory in (alone, other):
        spec = with_own_head(read_model_spec(directory), directory)
        assert spec.tied_embeddings
        assert set(find_tensors(directory, spec)) == set(tensors)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (torch.ones(4999, 128), ["lm_head.weight", "[4999, 128]", "[5000, 128]"]),
        (torch.ones(5000, 128, dtype=torch.int8), ["lm_head.weight", "I8", "unquantised"]),
    ],
)
def test_a_head_of_wrong_shape_or_dtype_is_refused(tied: Path, tmp_path: Path, head: Tensor, words: list[str]) -> None:
    directory = with_head(tied, tmp_path, head)
    with pytest.raises(ValueError) as refused:
        with_own_head(read_model_spec(directory), directory)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, ["weight_map is missing", "object"]),
        ({"weight_map": None}, ["weight_map is null"]),
        ({"weight_map": ["model.safetensors"]}, ['weight_map is ["model.safetensors"]']),
        ({"weight_map": {EMBEDDING: 3}}, ["weight_map", "3", "file name"]),
        ({"weight_map": {EMBEDDING: "model-9.safetensors"}}, ["weight_map", "model-9.safetensors", "does not exist"]),
        ({"weight_map": {EMBEDDING: "../model.safetensors"}}, ["weight_map", "../model.safetensors"]),
        ({"weight_map": {EMBEDDING: "/etc/passwd"}}, ["weight_map", "/etc/passwd"]),
        ({"weight_map": {EMBEDDING: ""}}, ["weight_map", '""']),
        ({"weight_map": {EMBEDDING: "a\0b"}}, ["weight_map", "does not exist"]),
        ({"weight_map": {EMBEDDING: "\ud800"}}, ["weight_map"]),
        ({"weight_map": {EMBEDDING: "x" * 5000}}, ["weight_map", "xxx..."]),
        ({"weight_map": {EMBEDDING: "."}}, ["weight_map"]),
        ([], ["not a JSON object"]),
    ],
)
def test_malformed_indexes_are_refused(tied: Path, tmp_path: Path, index: Any, words: list[str]) -> None:
    directory = with_head(tied, tmp_path, None)
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError) as refused:
        find_tensors(directory, read_model_spec(directory))
    message = str(refused.value)
    assert all(word in message for word in [str(directory / INDEX), *words]), message
    assert message.endswith(".")
    assert message.isprintable()


def test_an_index_without_entries_lacks_every_tensor(tied: Path, tmp_path: Path) -> None:
    directory = with_head(tied, tmp_path, None)
    (directory / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=r"has no tensor model.embed_tokens.weight and 23 more"):
        find_tensors(directory, read_model_spec(directory))


def test_a_directory_in_place_of_a_file_is_refused(tied: Path, tmp_path: Path) -> None:
    directory = with_head(tied, tmp_path, None)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        find_tensors(directory, read_model_spec(directory))
    (directory / INDEX).mkdir()
    with pytest.raises(ValueError, match=r"index.json cannot be read \(Is a directory\)"):
        find_tensors(directory, read_model_spec(directory))
