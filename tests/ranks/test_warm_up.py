"""Warm-up steps launch every kernel as later steps do, and leave no other trace.

What Triton would compile for a launch follows from its arguments. A child process records that in place of kernels
(this process may have imported triton as an interpreter); the C++ operations compute the results.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from hetis.core.messages.step_command import decode
from hetis.core.sampling_params import SamplingParams
from hetis.models import segments
from hetis.ranks.rank import build_member, warm_up
from hetis.ranks.warm_up import is_needed, warm_up_commands
from tests.checkpoints import make_checkpoint
from tests.engine import local_fleet
from tests.engine.local_fleet import Generated, LocalFleet, RandomDispatcher
from tests.kernels.against_reference import KERNELS
from tests.processes.look import DEADLINE

ROOT = Path(__file__).parents[2]
PLAN = {
    "stages": [{"layers": 1, "primaries": [{"head_groups": 3}, {"head_groups": 2}]}, {"primaries": [{}]}],
    "attention": [{}, {}],
}
NUM_RANKS = 5


def variant(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[str]:
    """Specialisation of a launch: types, constants, and which numbers are 1 or divisible by 16."""
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    parts = [f"{name}={value}" for name, value in keywords.items() if name not in kernel.arg_names]
    for parameter in kernel.params:
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            text = f"{value.dtype} aligned={value.data_ptr() % 16 == 0}"
        elif parameter.is_constexpr or value is None:
            text = repr(value)
        elif isinstance(value, float):
            text = "float"
        else:
            text = f"int{64 if abs(value) >= 2**31 else 32}"
            if not parameter.do_not_specialize:
                text += f" one={value == 1} divisible={value % 16 == 0}"
        parts.append(f"{parameter.name}: {text}")
    return parts


class Recorder:
    """Stand-in for a kernel that records the variants that its launches need."""

    def __init__(self, kernel: Any, found: set[tuple[str, ...]]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self._found.add((self._kernel.__name__, *variant(self._kernel, arguments, keywords)))

        return launch


def record_launches() -> set[tuple[str, ...]]:
    """Makes every launcher record its launch as on a GPU, then compute as before."""
    found: set[tuple[str, ...]] = set()

    def both(name: str, backend: str, device: torch.device, reference: Any, triton: Any) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            triton(*arguments)
            selected(*arguments)

        selected = select(name, backend, device, reference, triton)
        return run

    segments.serves = lambda *linears: 0  # operators are separate on a GPU
    select = import_module("hetis_kernels.dispatch").select
    for module_name, kernels in KERNELS.items():
        module = import_module(f"hetis_kernels.{module_name}")
        module.select = both  # type: ignore[attr-defined]
        for kernel in kernels:
            setattr(module, kernel, Recorder(getattr(module, kernel), found))
    return found


def generate(directory: Path) -> list[Generated]:
    """Generates for prompts of many lengths on a fleet with two homes in its first stage, two workers, random lanes."""
    plan = directory / "plan.json"
    plan.write_text(json.dumps(PLAN))
    draw = random.Random(0)
    prompts = [[draw.randrange(60) for _ in range(length)] for length in (1, 2, 15, 16, 17, 33, 300)]
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, logprobs=5)
    options: dict[str, Any] = {"dtype": "bfloat16", "max_num_batched_tokens": 48, "max_num_seqs": 5}
    with LocalFleet(directory, str(plan), dispatcher=RandomDispatcher(3), **options) as fleet:
        return fleet.generate(prompts, params)


def build_and_warm_up(setup: Any, *arguments: Any) -> Any:
    member = build_member(setup, *arguments)
    warm_up(member, setup)
    assert not member.take_times()
    stats = member.stats()
    assert stats.attention_seconds == sum(stats.bytes_sent.values()) == sum(stats.bytes_received.values()) == 0
    return member


def test_outputs_are_the_same_after_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "five_groups", max_position_embeddings=512)
    cold = generate(tmp_path)
    monkeypatch.setattr(local_fleet, "build_member", build_and_warm_up)
    for one, expected in zip(generate(tmp_path), cold, strict=True):
        assert one.token_ids == expected.token_ids
        assert one.rows == expected.rows


def test_no_kernel_is_compiled_after_warm_up() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ranks.test_warm_up"]
    child = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    warm, later = ({tuple(variant) for variant in variants} for variants in json.loads(child.stdout))
    assert {variant[0] for variant in warm} == {name for names in KERNELS.values() for name in names}
    assert later
    assert later <= warm, "\n".join(map(str, sorted(later - warm)))


def test_pages_are_transferred_both_ways_over_every_link(tmp_path: Path) -> None:
    """Both ends have then read and written pages."""
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    with LocalFleet(make_checkpoint(tmp_path, "five_groups"), str(tmp_path / "plan.json")) as fleet:
        setup = fleet.setup
    tables = [decode(command, rank=0).transfers for command in warm_up_commands(setup)]
    found = {pair for table in tables for pair in zip(table.source_N.tolist(), table.target_N.tolist(), strict=True)}
    links = {(home.rank, worker.rank) for home, worker in setup.plan.links}
    assert found == links | {link[::-1] for link in links}


def test_fleets_without_gpus_need_no_warm_up(tmp_path: Path) -> None:
    with LocalFleet(make_checkpoint(tmp_path, "llama3"), "1+1") as fleet:
        assert not is_needed(fleet.setup)


def main() -> None:
    """Prints a JSON list: the variants that warm-up steps need, and those of real steps."""
    found = record_launches()
    warm: set[tuple[str, ...]] = set()

    def begin() -> None:
        warm.update(found)
        found.clear()

    all_warm = threading.Barrier(NUM_RANKS, action=begin, timeout=DEADLINE)

    def build(*arguments: Any) -> Any:
        member = build_and_warm_up(*arguments)
        all_warm.wait()
        return member

    local_fleet.build_member = build
    with tempfile.TemporaryDirectory() as directory:
        generate(make_checkpoint(Path(directory), "five_groups", max_position_embeddings=512))
    print(json.dumps([sorted(warm), sorted(found)]))


if __name__ == "__main__":
    main()
