"""Plans: shares of any size add up to the model; what follows from them; refusals with the numbers."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hetis.core.model_spec import ModelSpec, RopeSpec
from hetis.core.plan import Plan
from hetis.core.plan_sources import load_plan, resolve_plan, split_evenly

SPEC = ModelSpec(
    family="llama",
    num_layers=7,
    hidden_size=64,
    num_query_heads=16,
    num_head_groups=8,
    head_dim=32,
    intermediate_size=701,
    vocab_size=1003,
    max_position=512,
    dtype="float32",
    rope=RopeSpec(theta=10000.0, rotary_dim=32),
    windows=(0,) * 7,
)


def assert_covers(plan: Plan, spec: ModelSpec) -> None:
    """Every layer, group, column and row belongs to exactly one primary; ranks are 0 .. world size - 1."""

    def assert_tiles(spans: list[tuple[int, int]], total: int) -> None:
        assert [i for first, stop in spans for i in range(first, stop)] == list(range(total))
        assert all(stop == following for (_, stop), (following, _) in pairwise(spans)), "even where a share is empty"

    assert_tiles([stage.layers for stage in plan.stages], spec.num_layers)
    assert all(stage.num_layers for stage in plan.stages)
    for stage in plan.stages:
        assert_tiles([p.groups for p in stage.primaries], spec.num_head_groups)
        assert_tiles([p.mlp_columns for p in stage.primaries], spec.intermediate_size)
        assert_tiles([p.vocab_rows for p in stage.primaries], spec.vocab_size)
    assert plan.ranks == tuple(range(plan.world_size))


@pytest.mark.parametrize("primaries", [1, 2, 3, 5, 8, 9, 20, 1003])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_even_split_covers_the_model(primaries: int, workers: int) -> None:
    plan = split_evenly(f"{primaries}+{workers}", SPEC, "cpu", "1GiB")
    assert_covers(plan, SPEC)
    assert (plan.world_size, len(plan.workers)) == (primaries + workers, workers)
    sizes = [p.num_groups for p in plan.stages[0].primaries]
    assert max(sizes) - min(sizes) <= 1
    assert {member.kv_memory for member in plan.members} == {2**30}


def test_devices_and_memory_by_rank() -> None:
    by_list = split_evenly("1+2", SPEC, ["cuda:0", "cuda:1", "cpu"], {1: "2GiB", 2: 77})
    assert [member.device for member in by_list.members] == ["cuda:0", "cuda:1", "cpu"]
    assert [member.kv_memory for member in by_list.members] == [None, 2**31, 77]
    by_call = split_evenly("2+1", SPEC, lambda rank: f"cuda:{rank}")
    assert by_call.device_of(2) == "cuda:2"
    assert (by_call.role_of(1), by_call.role_of(2)) == ("primary", "attention worker")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1004+1", ["1004+1", "rank 1003, a primary of stage 0", "0 MLP columns and 0 vocabulary rows", "fewer"]),
        ("0+3", ["no primary"]),
        ("1", ["P+A"]),
        ("1+2+3", ["P+A"]),
        ("-1+2", ["P+A"]),
        ("1+x", ["P+A"]),
        ("", ["P+A"]),
        ("nowhere.json", ["nowhere.json", "cannot be read"]),
    ],
)
def test_refused_text(text: str, numbers: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        resolve_plan(text, SPEC, "cpu")
    assert all(number in str(refused.value) for number in numbers)


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "CPU", ""])
def test_refused_device(device: str) -> None:
    with pytest.raises(ValueError, match="device"):
        split_evenly("1+0", SPEC, device)


def test_too_few_devices() -> None:
    with pytest.raises(ValueError, match="2 devices"):
        split_evenly("1+2", SPEC, ["cpu", "cpu"])


def write(path: Path, plan: Any) -> Path:
    path.write_text(json.dumps(plan))
    return path


def test_a_file_with_everything_given(tmp_path: Path) -> None:
    def primary(rank: int, groups: int, columns: int, rows: int) -> dict[str, Any]:
        counts = {"head_groups": groups, "mlp_columns": columns, "vocab_rows": rows}
        return {"rank": rank, "device": "cpu", "kv_memory": "1.5GiB", **counts}

    path = write(
        tmp_path / "plan.json",
        {
            "stages": [
                {"layers": 3, "primaries": [primary(3, 5, 700, 500), primary(0, 3, 1, 503)]},
                {"layers": 4, "primaries": [primary(2, 8, 701, 1003)]},
            ],
            "attention": [{"rank": 1, "device": "cuda:2", "kv_memory": 4096}],
        },
    )
    plan = load_plan(path, SPEC)
    assert_covers(plan, SPEC)
    assert plan.stages[0].primaries[0].groups == (0, 5)
    assert plan.home_ranks == ((3,) * 5 + (0,) * 3, (2,) * 8)
    assert (plan.position_of(2), plan.primary(2)) == ((1, 0), plan.stages[1].primaries[0])
    assert plan.stage_of(plan.primary(0)) == plan.stages[0]
    assert plan.stages[1].layers == (3, 7)
    assert (plan.workers[0].rank, plan.workers[0].device, plan.workers[0].kv_memory) == (1, "cuda:2", 4096)
    assert plan.members[0].kv_memory == 3 * 2**29


def test_what_a_file_leaves_out_is_split_evenly(tmp_path: Path) -> None:
    path = write(
        tmp_path / "plan.json",
        {
            "stages": [
                {"primaries": [{"head_groups": 5}, {}, {"rank": 0}]},
                {"layers": 2, "primaries": [{}]},
                {"primaries": [{}]},
            ],
            "attention": [{}, {"device": "auto"}],
        },
    )
    plan = resolve_plan(str(path), SPEC, lambda rank: f"cuda:{rank}", {5: 64}, world_size=7)
    assert_covers(plan, SPEC)
    assert [p.num_groups for p in plan.stages[0].primaries] == [5, 2, 1]
    assert [stage.num_layers for stage in plan.stages] == [3, 2, 2]
    assert [p.rank for p in plan.stages[0].primaries] == [1, 2, 0]
    assert plan.worker_ranks == (5, 6)
    assert [member.device for member in plan.members] == [f"cuda:{rank}" for rank in range(7)]
    assert plan.workers[0].kv_memory == 64


def test_primaries_without_head_groups_are_no_homes(tmp_path: Path) -> None:
    mqa = msgspec.structs.replace(SPEC, num_query_heads=4, num_head_groups=1)
    plan = split_evenly("3+2", mqa, "cpu")
    [stage] = plan.stages
    assert [p.groups for p in stage.primaries] == [(0, 1), (1, 1), (1, 1)]
    assert [p.num_mlp_columns for p in stage.primaries] == [234, 234, 233]
    assert [p.num_vocab_rows for p in stage.primaries] == [335, 334, 334]
    assert (stage.homes, stage.home_ranks, plan.num_groups) == (stage.primaries[:1], (0,), 1)
    assert [(home.rank, worker.rank) for home, worker in plan.links] == [(0, 3), (0, 4)]

    path = write(
        tmp_path / "plan.json",
        {
            "stages": [
                {"layers": 3, "primaries": [{"head_groups": 0}, {"mlp_columns": 0}, {"vocab_rows": 0}]},
                {"primaries": [{"head_groups": 0, "mlp_columns": 0}, {"vocab_rows": 0}]},
            ],
            "attention": [{}],
        },
    )
    plan = load_plan(path, SPEC, "cpu")
    assert_covers(plan, SPEC)
    assert [(stage, home.rank) for stage, home in plan.homes] == [(0, 1), (0, 2), (1, 4)]
    assert plan.home_ranks == ((1,) * 4 + (2,) * 4, (4,) * 8)
    assert [(home.rank, worker.rank) for home, worker in plan.links] == [(1, 5), (2, 5), (4, 5)]


ONE = [{"primaries": [{}]}]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ([], ["not a plan", "object"]),
        ({}, ["stages"]),
        ({"stages": []}, ["no stage"]),
        ({"stages": [{"primaries": []}]}, ["stage 0", "no primary"]),
        ({"stages": ONE, "workers": []}, ["unknown field `workers`"]),
        ({"stages": [{"primaries": [{"heads": 3}]}]}, ["unknown field `heads`"]),
        ({"stages": [{"primaries": [{"head_groups": "3"}]}]}, ["head_groups", "int"]),
        ({"stages": [{"layers": 6, "primaries": [{}]}]}, ["layers", "6", "7"]),
        ({"stages": [{"layers": 7, "primaries": [{}]}, *ONE]}, ["layers", "7 + ?", "has 7", "at least 1"]),
        ({"stages": [{"layers": 0, "primaries": [{}]}, *ONE]}, ["layers", "0 + ?", "at least 1"]),
        ({"stages": [{"primaries": [{"head_groups": 5}, {"head_groups": 4}]}]}, ["head_groups", "5 + 4", "9", "8"]),
        ({"stages": [{"primaries": [{"mlp_columns": 700}]}]}, ["mlp_columns", "700", "701"]),
        ({"stages": [{"primaries": [{"vocab_rows": 1004}, {}]}]}, ["vocab_rows", "1004 + ?", "1003"]),
        ({"stages": [{"layers": 6, "primaries": [{}]}, *ONE, *ONE]}, ["layers", "6 + ? + ?", "7", "at least 1"]),
        ({"stages": [{"primaries": [{"head_groups": -1}, {}]}]}, ["head_groups", "-1 + ?", "at least 0"]),
        ({"stages": [{"primaries": [{"vocab_rows": -5}, {}]}]}, ["vocab_rows", "-5 + ?", "at least 0"]),
        (
            {"stages": [{"primaries": [{"head_groups": 0, "mlp_columns": 0, "vocab_rows": 0}, {}]}]},
            ["rank 0, a primary of stage 0", "0 head groups, 0 MLP columns and 0 vocabulary rows;", "fewer primaries"],
        ),
        (
            {"stages": [*ONE, {"primaries": [{}, {"head_groups": 0, "mlp_columns": 0, "vocab_rows": 3}]}, *ONE]},
            ["rank 2, a primary of stage 1", "3 vocabulary rows, which only the first and the last stage read"],
        ),
        ({"stages": [{"primaries": [{"rank": 1}]}]}, ["[1]", "0 to 0"]),
        ({"stages": [{"primaries": [{"rank": 0}, {"rank": 0}]}]}, ["[0, 0]"]),
        ({"stages": [{"primaries": [{"device": "gpu"}]}]}, ["device 'gpu'", "rank 0"]),
        ({"stages": [{"primaries": [{"kv_memory": "lots"}]}]}, ["'lots'", "2GiB"]),
        ({"stages": [{"primaries": [{"kv_memory": 0}]}]}, ["0", "less than one byte"]),
    ],
)
def test_refused_files(tmp_path: Path, plan: Any, words: list[str]) -> None:
    path = write(tmp_path / "plan.json", plan)
    with pytest.raises(ValueError) as refused:
        load_plan(path, SPEC)
    assert str(path) in str(refused.value)
    assert all(word in str(refused.value) for word in words), refused.value
    if isinstance(plan, dict):
        with pytest.raises(ValueError, match=r"^the plan") as refused:
            resolve_plan(plan, SPEC)
        assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty"]),
        (" \n\t", ["is empty"]),
        ('{"stages": [\n  {"primaries": [{}]\n\n', ["ends in the middle (line 2)", "a ], }"]),
        ('{"stages": [{"primaries": [{"kv_memory": "2G', ["ends in the middle (line 1)"]),
        ('{"stages":\n  [{"primaries": [{}]},,]}', ["not JSON", "line 2, column 24"]),
        ("{'stages': []}", ["line 1, column 2", "double quotes"]),
        ('{"stages": []} {}', ["line 1, column 16", "extra data"]),
        ('{"stages": NaN}', ["not JSON", "NaN"]),
        ('{"stages": "\\ud800"}', ["not JSON"]),
        ("[" * 100_000, ["nested too deeply"]),
        ("\xff", ["UTF-8", "byte 0"]),
        ('{"stages": [{"primaries": [{"memory": 1}]}]}', ["stages[0].primaries[0]", "kv_memory?", "head_groups"]),
        ('{"stages": [{"primaries": [{}], "layer": 1}]}', ["stages[0]", "mean layers?", "known: primaries, layers"]),
        ('{"stages": [], "workers": []}', ["`workers`", "known: stages, attention"]),
        ('{"stages": [], "attention": [{"head_groups": 1}]}', ["attention[0]", "known: rank, device, kv_memory."]),
    ],
)
def test_refused_json(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError) as refused:
        load_plan(path, SPEC)
    assert str(refused.value).startswith(f"plan file {path} ")
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"stages": [{"primaries": [{}]}]}', encoding="utf-8-sig")
    assert load_plan(path, SPEC).world_size == 1


@pytest.mark.parametrize("plan", ["1+" + "9" * 5000, "10000+0", "x" * 5000, "1\0+0"])
def test_numbers_and_names_without_end_are_refused(plan: str) -> None:
    with pytest.raises(ValueError, match="plan"):
        resolve_plan(plan, SPEC)


def test_a_dictionary_is_read_like_a_file(tmp_path: Path) -> None:
    plan = {"stages": [{"layers": 2, "primaries": [{"head_groups": 5}, {}]}, {"primaries": [{}]}], "attention": [{}]}
    assert resolve_plan(plan, SPEC, "cpu") == load_plan(write(tmp_path / "plan.json", plan), SPEC, "cpu")


def test_world_size_must_fit() -> None:
    with pytest.raises(ValueError, match=r"3 ranks.*world size is 2"):
        resolve_plan("1+2", SPEC, "cpu", world_size=2)
    assert resolve_plan("1+2", SPEC, "cpu", world_size=3).world_size == 3
