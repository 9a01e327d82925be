"""`hetis profile` on the model in the package: its output, its cache, and profiles that are read from files."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hetis import LLM, SamplingParams
from hetis.core.profile import FleetProfile, KindProfile
from hetis.driver.profile_files import cache_folder, load, save
from tests.checkpoints import greedy_reference, load_reference, make_checkpoint
from tests.launch.fleet_process import ROOT
from tests.processes.look import DEADLINE

HETIS = [sys.executable, "-m", "hetis"]
SMALL = ["--device", "cpu", "--kv-cache-memory", "16MiB", "--log-level", "error", "--dtype", "float32"]


def run(arguments: list[str], cache: Path) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [*HETIS, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def measured(cache: Path) -> tuple[Path, str]:
    """A fleet measured with an empty cache: (file, standard output)."""
    file = cache / "fleet.json"
    result = run(["profile", "--plan", "1+1", *SMALL, "--output", str(file)], cache)
    assert (result.returncode, result.stderr) == (0, "")
    return file, result.stdout


def test_every_device_and_link_is_shown_and_written(measured: tuple[Path, str]) -> None:
    file, text = measured
    profile = load(file, FleetProfile)
    assert sorted(profile.devices) == [0, 1]
    assert [(link.primary, link.worker) for link in profile.links] == [(0, 1)]
    assert profile.devices[0].layer is not None
    assert profile.devices[1].layer is None
    assert profile.devices[0].key == profile.devices[1].key
    assert "measured in" in text
    assert "as rank 0" in text
    assert "auto" not in text
    assert [line.split()[:2] for line in text.split("Links")[1].splitlines()[2:4]] == [["0", "1"], ["1", "0"]]
    assert str(file) in text
    assert "…" not in text, "no column is cut"
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120


def test_the_next_start_reads_the_cache_unless_it_is_damaged(measured: tuple[Path, str], cache: Path) -> None:
    file, _ = measured
    known = load(file, FleetProfile).devices[0]
    folder = cache_folder({"XDG_CACHE_HOME": str(cache)})
    assert folder is not None
    [kept] = folder.iterdir()
    assert kept.name == known.key.file_name
    before = load(kept, KindProfile)
    assert (before.attention, before.layers) == (known.attention, (known.layer,))
    generate = ["generate", "--plan", "1+1", *SMALL, "--prompt", "It", "--max-tokens", "4"]
    written = kept.stat()
    assert run(generate, cache).returncode == 0
    assert kept.stat() == written, "nothing is measured or written"

    for damage in (b'{"key": "nonsense"}', b"[" * 100_000):
        kept.write_bytes(damage)
        result = run(generate, cache)
        assert (result.returncode, result.stderr) == (0, "")
        assert len(load(kept, KindProfile).layers) == 1, "measured and kept again"


def test_profile_measures_anew_and_updates_the_cache(measured: tuple[Path, str], cache: Path) -> None:
    file, _ = measured
    known = load(file, FleetProfile).devices[0]
    folder = cache_folder({"XDG_CACHE_HOME": str(cache)})
    assert folder is not None
    made_up = msgspec.structs.replace(known.attention, constant_us=123456.0)
    kind = KindProfile(key=known.key, attention=made_up, read_bytes_per_us=1.0)
    save(kind, folder / known.key.file_name)
    result = run(["profile", "--plan", "1+1", *SMALL], cache)
    assert result.returncode == 0, result.stderr
    assert not any(line.endswith("  cache") for line in result.stdout.splitlines())
    assert "as rank 0" in result.stdout, "one measurement per kind of device"
    assert load(folder / known.key.file_name, KindProfile).attention != made_up


def test_an_output_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path) -> None:
    result = run(["profile", *SMALL, "--output", str(tmp_path)], tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"hetis: --output {tmp_path} cannot be written")
    assert not any(tmp_path.iterdir()), "nothing was measured"


def test_profile_measures_a_fleet_without_workers(tmp_path: Path) -> None:
    result = run(["profile", *SMALL, "--no-profile-cache"], tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "measured in" in result.stdout
    assert "Links" not in result.stdout
    assert not any(tmp_path.iterdir()), "nothing is kept"


def test_a_profile_file_replaces_measuring(measured: tuple[Path, str], tmp_path: Path) -> None:
    file, _ = measured
    arguments = ["generate", "--plan", "1+1", *SMALL, "--profile", str(file), "--prompt", "It", "--max-tokens", "4"]
    result = run(arguments, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert not any(tmp_path.iterdir()), "nothing is kept"


def test_more_primaries_than_head_groups(tmp_path: Path) -> None:
    """One head group over two primaries: the second has only its share of the rest, no pages or links."""
    model, file = make_checkpoint(tmp_path / "mqa", "mqa"), tmp_path / "fleet.json"
    result = run(["profile", str(model), "--plan", "2+1", *SMALL, "--output", str(file)], tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    profile = load(file, FleetProfile)
    assert [(link.primary, link.worker) for link in profile.links] == [(0, 2)]
    layers = [profile.devices[rank].layer for rank in range(3)]
    assert [layer and (layer.share.num_groups, layer.prefill is None) for layer in layers] == [
        (1, False),
        (0, True),
        None,
    ]
    prompts = [[3, 1, 4, 1, 5], [9] * 40, [2, 6]]
    options = {"device": "cpu", "dtype": "float32", "kv_cache_memory": "16MiB", "profile": str(file)}
    with LLM(str(model), plan="2+1", **options) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
        members = llm.fleet_stats().members
    reference = load_reference(model)
    assert [o.outputs[0].token_ids for o in outputs] == [greedy_reference(reference, p, 12) for p in prompts]
    assert [member.pages_total > 0 for member in members] == [True, False, True]
    assert (members[1].heads_peak, members[1].bytes_sent, members[1].bytes_received) == (0, {}, {})


def test_a_file_that_does_not_fit_is_refused(measured: tuple[Path, str], tmp_path: Path) -> None:
    file, _ = measured
    whole = load(file, FleetProfile)
    part = tmp_path / "part.json"
    save(msgspec.structs.replace(whole, devices={0: whole.devices[0]}), part)
    result = run(["generate", "--plan", "1+1", *SMALL, "--profile", str(part)], tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(f"hetis: profile {part} lacks rank 1")


def test_a_file_made_for_another_dtype_is_refused(measured: tuple[Path, str], tmp_path: Path) -> None:
    file, _ = measured
    arguments = ["generate", "--plan", "1+1", *SMALL[:-1], "bfloat16", "--profile", str(file)]
    result = run(arguments, tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "rank 0: its dtype is float32 in the file and bfloat16 here" in result.stderr
