"""Every family on every kind of plan compared with transformers: equal greedy tokens, logits within 1e-4 (float32)."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from hetis.core.sampling_params import SamplingParams
from hetis.models.families import read_model_spec
from tests import cuda_stand_in
from tests.checkpoints import FAMILIES, load_reference, make_checkpoint, reference_logits
from tests.engine.local_fleet import LocalFleet, full_row

VOCAB = 331
NUM_TOKENS = 32
LENGTHS = (1, 5, 17, 33, 40, 9, 64, 31)
GPU_FAMILIES = ("llama3", "mistral", "qwen3", "opt", "five_groups", "head_dim_80", "head_dim_128")
GPU_PLANS = ("1+0", "1+2", "2+1", "uneven stages +1")  # ranks share one GPU
PLANS = ("1+0", "1+1", "1+3", "2+1", "3+2", "4+0", "uneven 2+2", "uneven stages +1", "sparse stages +2")


def prompts() -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in LENGTHS]


def long_prompts() -> list[list[int]]:
    """Two prompts whose lanes attention splits (from 256 tokens on), one whose lanes grow to that length, a short one.

    They need checkpoints with `max_position_embeddings=1024`.
    """
    draw = random.Random(2)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in (607, 701, 250, 3)]


class Reference:
    """A checkpoint and the logits of transformers for it, each computed once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = load_reference(directory, torch.float32)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def logits(self, prompt: list[int], out: list[int]) -> torch.Tensor:
        """float32 [len(out), V]: logits from which each token of `out` is drawn, given all tokens before it."""
        text = tuple(prompt + out)
        if text not in self._known:
            self._known[text] = reference_logits(self.model, prompt + out)
        return self._known[text][len(prompt) - 1 : -1]


Checkpoints = Callable[[str], Reference]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A function that makes the checkpoint of a family once."""

    @cache
    def make(family: str) -> Reference:
        return Reference(make_checkpoint(tmp_path_factory.mktemp(family), family))

    return make


def plan_text(name: str, directory: Path, tmp_path: Path) -> str:
    """The plan called `name`, as text or as a file."""
    spec = read_model_spec(directory)
    if name == "uneven 2+2":
        first = {"head_groups": spec.num_head_groups - 1, "mlp_columns": spec.intermediate_size // 3, "vocab_rows": 101}
        plan = {"stages": [{"primaries": [first, {}]}], "attention": [{}, {}]}
    elif name == "uneven stages +1":
        plan = {"stages": [{"layers": 1, "primaries": [{}]}, {"layers": 2, "primaries": [{}]}], "attention": [{}]}
    elif (
        name == "sparse stages +2"
    ):  # every kind of share is empty on some rank; rank 3 has vocabulary rows only, and samples
        wide = [{"head_groups": 0, "vocab_rows": 0}, {"mlp_columns": 0}, {"vocab_rows": 7}]
        deep = [{"head_groups": 0, "mlp_columns": 0}, {"vocab_rows": 0}]
        plan = {"stages": [{"layers": 1, "primaries": wide}, {"primaries": deep}], "attention": [{}, {}]}
    else:
        return name
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    return str(path)


def check_parity(family: str, plan: str, checkpoints: Checkpoints, tmp_path: Path, device: str) -> None:
    """Asserts that each token is the best one of transformers after the same tokens: by induction all are greedy."""
    reference = checkpoints(family)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, logprobs=-1)
    options = {"device": device, "logprobs_mode": "raw_logits", "max_num_batched_tokens": 50}
    with LocalFleet(reference.directory, plan_text(plan, reference.directory, tmp_path), **options) as fleet:
        found = fleet.generate(prompts(), params, check=True)
    for one, prompt in zip(found, prompts(), strict=True):
        assert len(one.token_ids) == NUM_TOKENS
        logits = reference.logits(prompt, one.token_ids)
        assert one.token_ids == logits.argmax(dim=-1).tolist()
        torch.testing.assert_close(one.logits(VOCAB), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_equal_transformers(family: str, plan: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    check_parity(family, plan, checkpoints, tmp_path, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("plan", GPU_PLANS)
@pytest.mark.parametrize("family", GPU_FAMILIES)
def test_tokens_and_logits_equal_transformers_on_a_gpu(
    family: str, plan: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    check_parity(family, plan, checkpoints, tmp_path, "cuda")


@pytest.mark.gpu
def test_a_gpu_and_cpu_workers_equal_transformers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    plan = {"stages": [{"primaries": [{"device": "cuda:0"}]}], "attention": [{"device": "cpu"}, {"device": "cuda:0"}]}
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(plan))
    check_parity("five_groups", str(path), checkpoints, tmp_path, "auto")


@pytest.mark.parametrize(("family", "plan"), [("five_groups", "2+1"), ("opt", "uneven stages +1")])
def test_tokens_and_logits_equal_transformers_on_the_stand_in_of_a_gpu(
    family: str, plan: str, checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoints(family)
    with cuda_stand_in.gpu(monkeypatch):
        check_parity(family, plan, checkpoints, tmp_path, "cuda")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("family", ["llama3", "qwen3", "opt"])
def test_bfloat16_is_close_to_float32(family: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Teacher-forced by prompt log-probabilities, so that one different token does not change those after it."""
    directory, model = checkpoints(family).directory, checkpoints(family).model
    with LocalFleet(directory, "1+0") as fleet:
        drawn = fleet.generate(prompts(), SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True))
    texts = [prompt + one.token_ids for prompt, one in zip(prompts(), drawn, strict=True)]
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, prompt_logprobs=-1)
    with LocalFleet(directory, "1+2", dtype="bfloat16") as fleet:
        found = fleet.generate(texts, params)
    for one, text in zip(found, texts, strict=True):
        rows = torch.stack([full_row(row, VOCAB) for row in one.prompt_rows if row is not None])
        reference = reference_logits(model, text)[:-1].log_softmax(dim=-1)
        likely = reference > -8  # in the tail of a sharp distribution the differences are noise
        assert (rows - reference)[likely].abs().mean() < 0.08
