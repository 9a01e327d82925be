"""Starting the processes of a fleet.

Under torchrun every process runs `run_member`. Without it, `LLM` and the command line start
`python -m hetis.server.launch ranks DIRECTORY`, which starts the same processes through torch's elastic launch API.
Either way rank 0 starts the driver, and, under torchrun, the front end: a second run of the same command line.

The private directory of a run holds the control sockets until all have connected, `config.json` and, after a failure, `verdict`.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from hetis.core.config import DriverArgs, EngineConfig, Joining
from hetis.core.plan import Plan

FRONT_VARIABLE = "HETIS_FRONT"  # set for a front end under torchrun: the run directory
VERDICT = "verdict"
_CONFIG = "config.json"
_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")


def under_torchrun() -> bool:
    """Whether this process is a rank that torchrun started (and not the front end that its rank 0 started)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and FRONT_VARIABLE not in os.environ


def make_run_directory() -> Path:
    """A new directory that only this user can enter."""
    return Path(tempfile.mkdtemp(prefix="hetis-", dir=os.environ.get("XDG_RUNTIME_DIR")))


# --- one rank ---------------------------------------------------------------------------------------------------------


def run_member(config: EngineConfig, front_argv: list[str] | None, run_directory: Path | None = None) -> NoReturn:
    """Runs this process as the rank that the environment says.

    `front_argv`: command line of the front end that rank 0 starts; None: somebody else is the front end and gave the
    `run_directory` in which it waits.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: ranks share cores with each other
    from hetis.comm.rendezvous import StoreRendezvous
    from hetis.workers.rank import run_rank

    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    rendezvous = StoreRendezvous.from_environment()
    children = None
    if rank == 0:
        try:
            children = Children(config, front_argv, run_directory)
        except (ValueError, OSError, RuntimeError) as error:
            give_up(f"rank 0 could not start: {error}", run_directory)
        rendezvous.set("joining", msgspec.json.encode(children.joining))
    ranks_on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    run_rank(rank, local_rank, ranks_on_host, own_address(), rendezvous)
    code = children.wait() if children is not None else 0
    sys.stdout.flush()
    os._exit(code)  # libraries' exit handlers may wait for peers that are already gone


def give_up(reason: str, run_directory: Path | None) -> NoReturn:
    """Ends this process; the reason goes to the terminal, or to the front end that waits in `run_directory`."""
    if run_directory is None:
        print(f"hetis: {reason}", file=sys.stderr, flush=True)
    else:
        (run_directory / VERDICT).write_text(reason)
    os._exit(1)


def own_address() -> str:
    """Where other hosts reach this one: the interface towards torchrun's master; loopback on a single host."""
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return "127.0.0.1"
    if "HETIS_ADDRESS" in os.environ:
        return os.environ["HETIS_ADDRESS"]
    target = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    family = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing; only asks the kernel for the route
        return str(probe.getsockname()[0])


class Children:
    """The driver and, under torchrun, the front end: children of rank 0, watched, and ended with it."""

    def __init__(self, config: EngineConfig, front_argv: list[str] | None, run_directory: Path | None) -> None:
        from hetis.models.families import read_eos_token_ids, read_model_spec
        from hetis.models.hub import resolve_model

        directory = resolve_model(config.model, config.revision, weights=False)
        spec = read_model_spec(directory)
        plan = check_world_size(resolve(config, spec))
        self._run_directory = run_directory or make_run_directory()
        many_hosts = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
        args = DriverArgs(
            config=config,
            spec=spec,
            plan=plan,
            eos_token_ids=read_eos_token_ids(directory),
            run_directory=str(self._run_directory),
            address=own_address() if many_hosts else None,
            announce=front_argv is not None,
        )
        self._driver = subprocess.Popen(
            [sys.executable, "-m", "hetis.engine.driver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._driver.stdin.write(msgspec.json.encode(args) + b"\n")
        self._driver.stdin.flush()
        line = self._driver.stdout.readline()
        if not line:
            raise RuntimeError("the driver ended before it had started: its error stands above.")
        self.joining: Joining = msgspec.json.decode(line, type=Joining)
        self._front: subprocess.Popen[bytes] | None = None
        if front_argv is not None:
            environment = {k: v for k, v in os.environ.items() if k not in _TORCHRUN_VARIABLES}
            environment[FRONT_VARIABLE] = str(self._run_directory)
            self._front = subprocess.Popen([sys.executable, "-m", "hetis", *front_argv], env=environment)
            threading.Thread(target=self._watch_front, daemon=True).start()
        threading.Thread(target=self._watch_driver, daemon=True).start()

    def _watch_front(self) -> None:
        """When the front end ends, for whatever reason, so does the driver: it reads the end of its standard input."""
        assert self._front is not None
        assert self._driver.stdin is not None
        self._front.wait()
        self._driver.stdin.close()

    def _watch_driver(self) -> None:
        """No driver, no fleet."""
        code = self._driver.wait()
        if code == 0:
            return
        if code < 0:  # killed; else it has said why
            reason = f"the driver (child of rank 0) was killed by {signal.Signals(-code).name}."
            (self._run_directory / VERDICT).write_text(reason)
            print(f"hetis: {reason}", file=sys.stderr, flush=True)
        self._remove_directory()
        os._exit(1)

    def wait(self) -> int:
        """After a shutdown in good order: the exit code of the job."""
        code = self._driver.wait()
        if self._front is not None:
            code = code or self._front.wait()
        self._remove_directory()
        return code

    def _remove_directory(self) -> None:
        if self._front is not None:  # else it belongs to the front end, which reads the verdict
            shutil.rmtree(self._run_directory, ignore_errors=True)


def resolve(config: EngineConfig, spec: Any) -> Plan:
    from hetis.core.plan import resolve_plan

    return resolve_plan(config.plan, spec, config.device, config.kv_cache_memory)


def check_world_size(plan: Plan) -> Plan:
    """ValueError if torchrun started another number of processes than the plan has ranks."""
    world = int(os.environ["WORLD_SIZE"])
    if world != plan.world_size:
        raise ValueError(
            f"the plan has {plan.world_size} ranks but WORLD_SIZE is {world}: "
            f"start {plan.world_size} processes (torchrun --nproc-per-node) or change --plan."
        )
    return plan


# --- all ranks of this host, without torchrun -------------------------------------------------------------------------


def start_launcher(config: EngineConfig, run_directory: Path, world_size: int) -> "subprocess.Popen[bytes]":
    """Starts the process that starts the ranks. It ends them all when its standard input is closed."""
    (run_directory / _CONFIG).write_bytes(msgspec.json.encode(config))
    environment = {k: v for k, v in os.environ.items() if k not in _TORCHRUN_VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-m", "hetis.server.launch", "ranks", str(run_directory), str(world_size)],
        stdin=subprocess.PIPE,
        stdout=2,  # ranks have nothing to say on standard output
        env=environment,
        start_new_session=True,  # Ctrl-C is for the front end, which then shuts down in order
    )


def launch_ranks(config: EngineConfig, run_directory: Path, world_size: int) -> int:
    """Starts `world_size` ranks on this host and waits for them; the exit code of the job."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        shutil.rmtree(run_directory, ignore_errors=True)
        os._exit(1)  # the ranks die with this process

    threading.Thread(target=end_with_parent, daemon=True).start()
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=run_directory.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port of the kernel's choice: many may start at once
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(launch_config, sys.executable)("-m", "hetis.server.launch", "rank", str(run_directory))
    except ChildFailedError as error:
        verdict = run_directory / VERDICT
        if not verdict.exists():
            rank, failure = error.get_first_failure()
            verdict.write_text(f"rank {rank} exited with code {failure.exitcode} before the fleet was up.")
        return 1
    return 0


def main() -> NoReturn:
    """`ranks DIRECTORY WORLD_SIZE`: the launcher. `rank DIRECTORY`: one rank, started by it."""
    role, directory = sys.argv[1], Path(sys.argv[2])
    config = msgspec.json.decode((directory / _CONFIG).read_bytes(), type=EngineConfig)
    if role == "rank":
        run_member(config, None, directory)
    import logging

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the verdict says it better
    world_size = int(sys.argv[3])
    os._exit(launch_ranks(config, directory, world_size))


if __name__ == "__main__":
    main()
