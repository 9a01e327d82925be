"""Logits of the decoder equal those of transformers, for every family and every split."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from hetis.core.model_spec import ModelSpec
from hetis.core.plan import AttentionWorker, Plan, Primary, Stage
from hetis.core.plan_sources import split_evenly
from hetis.core.spans import spans
from hetis.models.families import read_model_spec
from tests.checkpoints import FAMILIES, load_reference, make_checkpoint, reference_logits
from tests.models.reference import decode_all

# tokens 199 and 200 are in different shards of `uneven`
PROMPT = [5, 17, 300, 2, 2, 99, 41, 330, 7, 250, 0, 18, 64, 129, 3, 77, 199, 200, 9, 9, 201, 33, 54]


class Case:
    """A checkpoint, its spec, and the logits of transformers for `PROMPT`."""

    def __init__(self, directory: Path, family: str, **overrides: Any) -> None:
        self.directory = make_checkpoint(directory, family, **overrides)
        self.model = load_reference(self.directory)
        self.spec = read_model_spec(self.directory)
        self.logits_TV = reference_logits(self.model, PROMPT)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Case] = {}

    def case(family: str) -> Case:
        if family not in made:
            made[family] = Case(tmp_path_factory.mktemp(family), family)
        return made[family]

    return case


def uneven(spec: ModelSpec, num_stages: int) -> Plan:
    """Plan of one or two stages with two primaries each; shares are unequal, and a single head group is the first's."""

    def primaries(first_rank: int) -> tuple[Primary, ...]:
        group, column, row = max(1, spec.num_head_groups - 2), 37, 200
        return (
            Primary(rank=first_rank, device="cpu", groups=(0, group), mlp_columns=(0, column), vocab_rows=(0, row)),
            Primary(
                rank=first_rank + 1,
                device="cpu",
                groups=(group, spec.num_head_groups),
                mlp_columns=(column, spec.intermediate_size),
                vocab_rows=(row, spec.vocab_size),
            ),
        )

    layers = [(0, spec.num_layers)] if num_stages == 1 else [(0, 1), (1, spec.num_layers)]
    stages = tuple(Stage(layers=span, primaries=primaries(2 * index)) for index, span in enumerate(layers))
    return Plan(stages=stages, workers=(AttentionWorker(rank=2 * num_stages, device="cpu"),))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_early_token_changes_the_last_logits(cases: Any, family: str) -> None:
    case = cases(family)
    difference = reference_logits(case.model, [PROMPT[0], PROMPT[1] + 1, *PROMPT[2:]])[-1] - case.logits_TV[-1]
    window = max(case.spec.windows)
    reach = len(PROMPT) if min(case.spec.windows) == 0 else window * case.spec.num_layers
    assert difference.abs().max() > (0.3 if reach >= len(PROMPT) else 0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(cases: Any, family: str) -> None:
    case = cases(family)
    logits_TV = decode_all(case.spec, split_evenly("1+0", case.spec), case.directory, PROMPT)
    torch.testing.assert_close(logits_TV, case.logits_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_stages", [1, 2])
def test_uneven_shards_and_stages_give_the_same_logits(cases: Any, family: str, num_stages: int) -> None:
    case = cases(family)
    logits_TV = decode_all(case.spec, uneven(case.spec, num_stages), case.directory, PROMPT)
    torch.testing.assert_close(logits_TV, case.logits_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
        ("llama2", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2}),
        ("opt", {"activation_function": "gelu"}),
        ("opt", {"activation_function": "gelu_new", "enable_bias": False, "tie_word_embeddings": False}),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("mistral", {"sliding_window": 1}),
        ("qwen3", {"attention_bias": True, "num_hidden_layers": 1}),
    ],
)
def test_less_common_settings(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    case = Case(tmp_path, family, **overrides)
    logits_TV = decode_all(case.spec, split_evenly("1+0", case.spec), case.directory, PROMPT)
    torch.testing.assert_close(logits_TV, case.logits_TV, rtol=0, atol=1e-4)


def test_five_shards_of_one_group_each(cases: Any) -> None:
    case = cases("five_groups")
    logits_TV = decode_all(case.spec, split_evenly("5+0", case.spec), case.directory, PROMPT)
    torch.testing.assert_close(logits_TV, case.logits_TV, rtol=0, atol=1e-4)


def test_two_stages_are_bit_identical_to_one(cases: Any) -> None:
    """A stage border only copies the residual stream from one buffer to another."""
    case = cases("mqa")
    plan = split_evenly("1+0", case.spec)
    stages = tuple(msgspec.structs.replace(plan.stages[0], layers=span) for span in ((0, 1), (1, case.spec.num_layers)))
    one = decode_all(case.spec, plan, case.directory, PROMPT)
    two = decode_all(case.spec, Plan(stages=stages), case.directory, PROMPT)
    assert torch.equal(one, two)


def sparse(spec: ModelSpec) -> Plan:
    """Plan of three stages in which every kind of share is empty on some rank, and some ranks have only one kind.

    The first rank of a stage adds the biases of row-parallel layers even if it has no share of the layer.
    """

    def stage(first_rank: int, layer: int, *shares: tuple[int, int, int]) -> Stage:
        """`shares`: head groups, MLP columns and vocabulary rows of each primary."""
        groups, columns, rows = (spans(counts) for counts in zip(*shares, strict=True))
        primaries = tuple(
            Primary(rank=first_rank + i, device="cpu", groups=g, mlp_columns=c, vocab_rows=r)
            for i, (g, c, r) in enumerate(zip(groups, columns, rows, strict=True))
        )
        return Stage(layers=(layer, layer + 1), primaries=primaries)

    G, F, V = spec.num_head_groups, spec.intermediate_size, spec.vocab_size
    return Plan(
        stages=(
            stage(0, 0, (0, 0, V - 3), (G, 0, 0), (0, F, 0), (0, 0, 3)),
            stage(4, 1, (0, F - 1, V), (G, 1, 0)),
            stage(6, 2, (0, F, 0), (1, 0, 5), (G - 1, 0, V - 5)),
        )
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_may_be_empty(cases: Any, family: str) -> None:
    case = cases(family)
    assert case.spec.num_layers == 3
    logits_TV = decode_all(case.spec, sparse(case.spec), case.directory, PROMPT)
    torch.testing.assert_close(logits_TV, case.logits_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "opt"])
def test_bfloat16_logprobs_are_close(cases: Any, family: str) -> None:
    case = cases(family)
    logits_TV = decode_all(case.spec, split_evenly("1+0", case.spec), case.directory, PROMPT, torch.bfloat16)
    ours, theirs = logits_TV.float().log_softmax(dim=-1), case.logits_TV.log_softmax(dim=-1)
    assert (ours.exp() - theirs.exp()).abs().max() < 0.05
