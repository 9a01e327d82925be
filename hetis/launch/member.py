"""One rank of a fleet, and what rank 0 starts: the driver and, under torchrun, the front end.

Under torchrun every process runs `run_member`. Without it, `LLM` and the command line start the same processes through
`local_launcher.py`. The private directory of a run holds the control sockets until all have connected and, after a
failure, the verdict.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from hetis.core.config import DriverArgs, EngineConfig, Joining
from hetis.core.files import check_writable, refuse_pipe
from hetis.core.logs import set_up_logging
from hetis.core.model_spec import ModelSpec
from hetis.core.plan import Plan
from hetis.core.plan_sources import resolve_plan
from hetis.core.profile import FleetProfile
from hetis.launch import torchrun
from hetis.models.end_tokens import read_eos_token_ids, read_tokenizer_eos
from hetis.models.families import read_model_spec
from hetis.models.hub import expanded, resolve_model
from hetis.models.json_files import read_object
from hetis.models.weight_files import find_tensors, with_own_head
from hetis.processes import children, supervision

if TYPE_CHECKING:
    from hetis.comm.rendezvous import StoreRendezvous

fleet_directory: Path | None = None  # set where this process is the front end of a fleet under torchrun

RANK_DEFAULTS = {  # environment of a rank, read when torch is imported or CUDA is first used
    "OMP_WAIT_POLICY": "PASSIVE",  # ranks share cores with each other
    "THP_MEM_ALLOC_ENABLE": "1",  # huge pages for weights and cache: less time in page walks
    # A hardware queue for each stream (8 by default). Where two share one, work of a stage may stand behind another
    # stage's wait for a message that depends on it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}
_PREFIX = "hetis-"
_LONGEST_PLACE = 107 - len(f"/{_PREFIX}12345678/health")  # bytes: the kernel's limit for the path of a socket
_END_SECONDS = 0.5  # for this rank to end after the driver has


def make_run_directory() -> Path:
    """A new directory that only this user can enter, with a name short enough for the sockets in it.

    ValueError where there is no place for one.
    """
    named = [os.environ.get(name) for name in ("XDG_RUNTIME_DIR", "TMPDIR")]
    places = [place for place in (*named, "/tmp", "/var/tmp", "/dev/shm") if place]
    for place in places:
        if os.path.isabs(place) and len(os.fsencode(place)) <= _LONGEST_PLACE:
            with suppress(OSError):
                directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
                if holds_sockets(directory):
                    return directory
                directory.rmdir()
    raise ValueError(
        f"there is no place for the sockets of a run: tried {', '.join(places)}. Set TMPDIR to a folder that can be "
        f"written to and whose path has at most {_LONGEST_PLACE} bytes."
    )


def holds_sockets(directory: Path) -> bool:
    """Not every file system does that can be written to: those of some container hosts and networks do not."""
    trial = directory / "health"
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(trial))
        trial.unlink()
    except OSError:
        return False
    return True


def plan_for(config: EngineConfig) -> tuple[Path, ModelSpec, Plan]:
    """(directory of the model, what it is, who does what).

    ValueError for what does not fit together, and for a profile or trace file that is of no use: before anything
    starts.
    """
    if config.trace is not None:
        refuse_pipe(Path(config.trace), "trace file")
        check_writable(Path(config.trace), "trace file", (config.plan, config.profile))
    if config.profile is not None:
        from hetis.driver.profile_files import load  # and numpy: 0.1 s of every start

        load(Path(config.profile), FleetProfile)
    directory = resolve_model(config.model, config.revision, weights=False)
    if config.tokenizer is not None:
        resolve_model(config.tokenizer, weights=False, what="tokenizer")
    spec = read_model_spec(directory)
    _check_files(config, directory, spec)
    plan = resolve_plan(config.plan, spec, config.device, config.kv_cache_memory)
    by_rank = config.kv_cache_memory if isinstance(config.kv_cache_memory, dict) else {}
    for rank in by_rank.keys() - range(plan.world_size):
        raise ValueError(f"kv_cache_memory names rank {rank}, but the plan has ranks 0 to {plan.world_size - 1}.")
    return directory, spec, plan


def _check_files(config: EngineConfig, directory: Path, spec: ModelSpec) -> None:
    """ValueError for files that ranks would refuse later, as far as they are here."""
    if (directory / "generation_config.json").exists():
        read_object(directory / "generation_config.json")
    if config.load_format == "dummy":
        return
    if spec.tied_embeddings:
        resolve_model(config.model, config.revision)  # how much memory they take depends on the weights themselves
    is_local = config.model is None or directory == expanded(config.model)
    if spec.tied_embeddings or is_local:
        find_tensors(directory, spec)


def end_of_sequence_ids(config: EngineConfig, directory: Path, vocab_size: int) -> list[int]:
    """The tokens that end a sequence: those of the model's configuration, and the tokenizer's own, as in vLLM."""
    if config.tokenizer is not None:
        tokenizer_directory = resolve_model(config.tokenizer, weights=False, what="tokenizer")
    else:
        tokenizer_directory = directory
    own = [token for token in read_tokenizer_eos(tokenizer_directory) if 0 <= token < vocab_size]  # others never come
    return list(dict.fromkeys([*read_eos_token_ids(directory, vocab_size), *own]))


# --- one rank ---------------------------------------------------------------------------------------------------------


def run_member(
    config: EngineConfig, front_argv: list[str] | None, run_directory: Path | None = None, parent: int | None = None
) -> NoReturn:
    """Runs this process as the rank that the environment says, as long as its `parent` lives (None: as it is now).

    `front_argv`: command line of the front end that rank 0 starts; None: the front end runs already, and waits in
    `run_directory`.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the rank's heart beats; no traceback of an import
    children.begin(os.getppid() if parent is None else parent)
    for name, value in RANK_DEFAULTS.items():
        os.environ.setdefault(name, value)
    own_children = None
    try:
        if run_directory is None:
            torchrun.check_variables()
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        set_up_logging(f"rank {rank}")
        if rank == 0:
            own_children = Children(config, front_argv, run_directory)  # they start while torch is imported here
    except (ValueError, OSError) as error:
        give_up(error, run_directory)
    from hetis.ranks.rank import run_rank

    rendezvous = _meet(run_directory)
    if own_children is not None:
        rendezvous.set("joining", own_children.joining())
    ranks_on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_lost_driver = None if own_children is None else own_children.on_lost_driver
    run_rank(rank, local_rank, ranks_on_host, torchrun.own_address(), rendezvous, on_lost_driver)
    sys.stdout.flush()
    # libraries' exit handlers may wait for peers that are gone
    os._exit(0 if own_children is None else own_children.wait())


def _meet(run_directory: Path | None) -> "StoreRendezvous":
    """By torchrun's store; or by a file in a directory of our own, which needs no port that could be taken."""
    from torch.distributed import FileStore

    from hetis.comm.rendezvous import StoreRendezvous

    if run_directory is None:
        return StoreRendezvous.from_environment()
    return StoreRendezvous(FileStore(str(run_directory / "store"), -1))


def give_up(error: Exception, run_directory: Path | None) -> NoReturn:
    """Ends this process; the reason goes to the terminal, or to the front end that waits in `run_directory`."""
    supervision.report_to_torchrun(str(error))
    if run_directory is None:
        print(f"hetis: {error}", file=sys.stderr, flush=True)
    else:
        supervision.leave_verdict(run_directory, supervision.Verdict(str(error), isinstance(error, ValueError)))
    os._exit(1)


class Children:
    """The driver and, under torchrun, the front end: children of rank 0, watched, and ended with it."""

    def __init__(self, config: EngineConfig, front_argv: list[str] | None, run_directory: Path | None) -> None:
        """Starts both; ValueError for what does not fit together."""
        directory, spec, plan = plan_for(config)
        torchrun.check_world_size(plan)
        if config.load_format != "dummy":
            spec = with_own_head(spec, directory)
        self._run_directory = run_directory or make_run_directory()
        many_hosts = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
        self._args = DriverArgs(
            config=config,
            spec=spec,
            plan=plan,
            eos_token_ids=end_of_sequence_ids(config, directory, spec.vocab_size),
            run_directory=str(self._run_directory),
            address=torchrun.own_address() if many_hosts else None,
            announce=front_argv is not None,
            parent=os.getpid(),
        )
        self._ending = threading.Lock()
        # Launchers end whole process groups. These two end when rank 0 and its heart want it: the driver has to explain
        # the end, and the front end to show the explanation and what was computed before.
        with supervision.hold(signal.SIGTERM, signal.SIGINT):
            self._driver = self._start_driver()
            signal.signal(signal.SIGTERM, self._on_early_end)  # until the rank's heart takes over
        with supervision.hold(signal.SIGTERM):  # Ctrl-C is the front end's business
            self._front = None if front_argv is None else self._start_front(front_argv)
        threading.Thread(target=self._watch_driver, daemon=True).start()

    def _start_driver(self) -> "subprocess.Popen[bytes]":
        driver = subprocess.Popen(
            children.command("hetis.driver.driver"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=children.environment(),
        )
        assert driver.stdin is not None
        with suppress(BrokenPipeError):  # it is gone already: `_watch_driver` says so
            driver.stdin.write(msgspec.json.encode(self._args) + b"\n")
            driver.stdin.flush()
        return driver

    def _start_front(self, argv: list[str]) -> "subprocess.Popen[bytes]":
        command = children.command("hetis.launch.front_end", str(self._run_directory), str(os.getpid()), *argv)
        front = subprocess.Popen(command, env=torchrun.without_torchrun(children.environment()))
        threading.Thread(target=self._watch_front, args=(front,), daemon=True).start()
        return front

    def joining(self) -> bytes:
        """Where the driver listens, once it does."""
        assert self._driver.stdout is not None
        line = self._driver.stdout.readline()
        if not line:
            self.on_lost_driver("ended")
        return msgspec.json.encode(msgspec.json.decode(line, type=Joining))

    def _watch_front(self, front: "subprocess.Popen[bytes]") -> None:
        """When the front end ends, for whatever reason, the driver shuts down."""
        code = front.wait()
        if code < 0 and -code != signal.SIGINT:
            self._announce(f"the front end (child of rank 0) was killed by {supervision.signal_name(-code)}.")
        self._write_to_driver(supervision.END)

    def _write_to_driver(self, line: bytes) -> None:
        assert self._driver.stdin is not None
        with suppress(BrokenPipeError):
            self._driver.stdin.write(line)
            self._driver.stdin.flush()

    def _on_early_end(self, *_: object) -> None:
        """The launcher ends this rank before it has joined. The driver could not see why by looking at it."""
        self._write_to_driver(supervision.TOLD)
        os._exit(128 + signal.SIGTERM)

    def _watch_driver(self) -> None:
        """No driver, no fleet. It goes before this rank does, so in good order there is a moment left to end."""
        if self._driver.wait() == 0:
            threading.Event().wait(_END_SECONDS)
        self.on_lost_driver("ended")

    def on_lost_driver(self, how: str) -> NoReturn:
        """Ends this rank, and the driver if it only seems to run. Two threads may see it; the first one acts."""
        self._ending.acquire()
        if how != "ended":
            supervision.kill([self._driver.pid])
            self._announce(f"the driver (child of rank 0, pid {self._driver.pid}) {how}.")
        code = self._driver.wait()
        if code < 0:
            self._announce(f"the driver (child of rank 0) was killed by {supervision.signal_name(-code)}.")
        verdict = supervision.read_verdict(self._run_directory)
        if verdict is not None:
            supervision.report_to_torchrun(verdict.reason)
        os._exit(self.wait())

    def _announce(self, reason: str) -> None:
        """A verdict that the driver could not give."""
        is_first = supervision.leave_verdict(self._run_directory, supervision.Verdict(reason))
        if is_first and self._args.announce:
            print(f"hetis: {reason}", file=sys.stderr, flush=True)

    def wait(self) -> int:
        """For the driver, and for the front end if it ended the job: the exit code of the job."""
        code = self._driver.wait()
        if self._front is not None:
            if code == 0:
                code = self._front.wait()
            shutil.rmtree(self._run_directory, ignore_errors=True)  # else it belongs to the front end
        return code if code >= 0 else 128 - code
