"""One rank of a fleet, from the start of its process.

Under torchrun every process runs `run_member`. Without it, `LLM` and the command line start the same processes by
`local_launcher.py`.
"""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hetis.core.config import EngineConfig
from hetis.core.logs import set_up_logging
from hetis.launch import torchrun
from hetis.launch.children import Children
from hetis.processes import failure, start

if TYPE_CHECKING:
    from hetis.comm.rendezvous import StoreRendezvous

RANK_DEFAULTS = {  # environment of a rank, read when torch is imported or CUDA is first used
    "OMP_WAIT_POLICY": "PASSIVE",  # ranks share cores with each other
    "THP_MEM_ALLOC_ENABLE": "1",  # huge pages for weights and cache: less time in page walks
    # A hardware queue for each stream (8 by default). If two streams shared one, the work of a stage could queue behind
    # the other's wait for a message that depends on it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}


def run_member(
    config: EngineConfig,
    *,
    measure: bool = False,
    front_argv: list[str] | None = None,
    run_directory: Path | None = None,
    parent: int | None = None,
) -> NoReturn:
    """Runs this process as the rank that its environment names, as long as its `parent` lives (None: the one now).

    `measure`: every device and link is measured anew. `front_argv`: command line of the front end that rank 0 starts;
    None: the front end runs, and waits in `run_directory`.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a heartbeat: no traceback of an import
    start.begin(os.getppid() if parent is None else parent)
    for name, value in RANK_DEFAULTS.items():
        os.environ.setdefault(name, value)
    children = None
    try:
        if run_directory is None:
            torchrun.check_variables()
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        set_up_logging(f"rank {rank}")
        if rank == 0:  # they start while this process imports torch
            children = Children(config, measure=measure, front_argv=front_argv, run_directory=run_directory)
    except (ValueError, OSError) as error:
        give_up(error, run_directory)
    from hetis.ranks.rank import run_rank

    rendezvous = _meet(run_directory)
    if children is not None:
        rendezvous.set("joining", children.joining())
    ranks_on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_lost_driver = None if children is None else children.on_lost_driver
    run_rank(rank, local_rank, ranks_on_host, torchrun.own_address(), rendezvous, on_lost_driver)
    sys.stdout.flush()
    # libraries' exit handlers may wait for peers that have ended
    os._exit(0 if children is None else children.wait())


def _meet(run_directory: Path | None) -> "StoreRendezvous":
    """Torchrun's store, or a file in the run directory, which needs no port."""
    from torch.distributed import FileStore

    from hetis.comm.rendezvous import StoreRendezvous

    if run_directory is None:
        return StoreRendezvous.from_environment()
    return StoreRendezvous(FileStore(str(run_directory / "store"), -1))


def give_up(error: Exception, run_directory: Path | None) -> NoReturn:
    """Ends this process; the reason goes to stderr, or to the front end that waits in `run_directory`."""
    failure.report_to_torchrun(str(error))
    if run_directory is None:
        failure.show(str(error))
    else:
        reason = failure.FailureReason(str(error), refused=isinstance(error, ValueError))
        failure.FailureRecord(run_directory).write(reason)
    os._exit(1)
