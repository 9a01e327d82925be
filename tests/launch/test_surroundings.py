"""A fleet runs in unusual shells, launchers and containers, with the same tokens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hetis import LLM, SamplingParams
from tests.launch.fleet_process import SHIM, torchrun_command
from tests.processes.look import DEADLINE

pytestmark = pytest.mark.process

HETIS = [sys.executable, "-P", "-m", "hetis"]
GENERATE = ["generate", "--device", "cpu", "--kv-cache-memory", "16MiB", "--max-tokens", "8", "--temperature", "0"]
GENERATE += ["--no-stats", "--prompt", "The function returns", "--dispatch", "even"]
# modules of the standard library and others that ranks, driver and front end import
SHADOWS = ("random", "json", "typing", "logging", "socket", "ctypes", "tempfile", "queue", "argparse", "statistics")
SHADOWS += ("torch", "numpy", "zmq", "msgspec", "transformers", "tokenizers", "safetensors", "psutil", "regex")


@pytest.fixture(scope="module")
def text() -> str:
    """The first line of what this model writes."""
    params = SamplingParams(max_tokens=8, temperature=0)
    with LLM(device="cpu", kv_cache_memory="16MiB") as llm:
        return llm.generate("The function returns", params)[0].outputs[0].text.strip().splitlines()[0]


def run(command: list[str], shell: str = "", cwd: Path | None = None, **variables: str) -> str:
    """Standard output of a command that must end well, after commands of `shell`."""
    done = subprocess.run(
        ["bash", "-c", f'{shell} exec "$0" "$@"', *command],
        cwd=cwd, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("start", ["alone", "python -m", "torchrun"])
def test_files_of_the_working_directory_are_not_imported_and_paths_are_relative_to_it(
    tmp_path: Path, text: str, start: str
) -> None:
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the working directory was imported')\n")
    (tmp_path / "hetis").mkdir()
    (tmp_path / "plan").write_text('{"stages": [{"primaries": [{}]}], "attention": [{}]}')
    hetis = {
        "alone": HETIS,
        "python -m": [sys.executable, "-m", "hetis"],
        # not by its module: Python itself would put the working directory first for torch, too
        "torchrun": [str(Path(sys.executable).with_name("torchrun")),
                     *torchrun_command("--standalone", "--nproc-per-node", "2")[3:]],
    }[start]  # fmt: skip
    assert text in run([*hetis, *GENERATE, "--plan", "plan"], cwd=tmp_path)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"},
        {"RANK": "abc", "WORLD_SIZE": "7", "LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "0", "GROUP_WORLD_SIZE": "3"},
        {"HETIS_FRONT": "/nowhere", "HETIS_PARENT": "1", "OMP_NUM_THREADS": "abc", "CUDA_VISIBLE_DEVICES": ""},
    ],
)
def test_variables_of_other_programs(text: str, variables: dict[str, str]) -> None:
    assert text in run([*HETIS, *GENERATE, "--plan", "1+1"], **variables)


def test_a_bare_container(tmp_path: Path, text: str) -> None:
    """No home, no TMPDIR, few open files, ASCII, a deleted working directory, no standard input, a full stderr."""
    gone = tmp_path / "gone"
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    shell = (
        "unset HOME XDG_RUNTIME_DIR XDG_CACHE_HOME USER LOGNAME; ulimit -n 64; umask 0077; "
        f"mkdir {gone}; cd {gone}; rmdir {gone}; exec <&- 2>/dev/full;"
    )
    out = run([*HETIS, *GENERATE, "--plan", "1+1"], shell, TMPDIR="/nowhere", **variables)
    assert text in out


def test_a_sandbox_without_calls_for_processes(text: str) -> None:
    variables = {"PYTHONPATH": str(SHIM), "FORBIDDEN_CALLS": "1"}
    assert text in run([*HETIS, *GENERATE, "--plan", "1+1"], **variables)


def test_standard_streams_that_are_closed(tmp_path: Path) -> None:
    """The processes of an `LLM` have them, even if the program has none."""
    script = (
        "from hetis import LLM, SamplingParams\n"
        f"with LLM(device='cpu', kv_cache_memory='16MiB') as llm, open({str(tmp_path / 'ids')!r}, 'w') as file:\n"
        "    file.write(str(len(llm.generate('It', SamplingParams(max_tokens=3, ignore_eos=True))[0]"
        ".outputs[0].token_ids)))\n"
    )
    run([sys.executable, "-c", script], "exec <&- >&- 2>&-;")
    assert (tmp_path / "ids").read_text() == "3"


def test_a_user_without_an_entry_or_a_home(text: str) -> None:
    """As in containers that run with an arbitrary user id."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    caps = "+dac_override,+dac_read_search"  # so that it can read this installation, wherever it is
    command = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", "--inh-caps", caps]
    command += ["--ambient-caps", caps, *HETIS, *GENERATE]
    assert text in run(command, "unset HOME USER LOGNAME;", XDG_CACHE_HOME="/nowhere")


def test_a_container_with_less_than_its_host(text: str, groups: dict[str, Path]) -> None:
    """Without a size the cache gets what the container has free: sequences of full length would take several GiB."""
    (groups["memory"] / "memory.limit_in_bytes").write_text(str(1 << 30))
    (groups["cpu"] / "cpu.cfs_quota_us").write_text("60000")
    join = "".join(f"echo $$ > {path}/cgroup.procs; " for path in groups.values())
    script = (
        "from hetis import LLM, SamplingParams\n"
        "params = SamplingParams(max_tokens=8, temperature=0)\n"
        "with LLM(device='cpu', max_num_seqs=4096) as llm:\n"
        "    print(llm.generate('The function returns', params)[0].outputs[0].text)\n"
        "    print(llm.ledger.splitlines()[1])\n"
    )
    out = run([sys.executable, "-c", script], join)
    assert text in out
    units = re.findall(r"[\d.]+ ([KMGT]iB)", out.splitlines()[-1])
    assert units[0] == "MiB", "free memory is less than the limit of 1 GiB"
