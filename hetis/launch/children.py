"""The processes that an agent has started: the driver, ranks, and what ranks leave."""

import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress

from hetis.launch import torchrun
from hetis.processes import start, supervision

DRIVER = -1  # beside numbers of ranks

_RANK_DEFAULTS = {  # environment of a rank, read when torch is imported or CUDA is first used
    "OMP_WAIT_POLICY": "PASSIVE",  # ranks share cores with each other: without a core for each thread none spins
    # 0.2 ms of spinning, longer than from one parallel region to the next. With 2 ms a quiet machine serves 8 to
    # 23 % more (bench/LOG.md, overload), but beside two busy processes 3 to 15 times less: libgomp never yields.
    "GOMP_SPINCOUNT": "10000",
    "THP_MEM_ALLOC_ENABLE": "1",  # huge pages for weights and cache: less time in page walks
    # A hardware queue for each stream (8 by default). If two streams shared one, the work of a stage could queue behind
    # the other's wait for a message that depends on it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}


def with_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a rank. How long threads spin is the user's choice if a variable of the user says so."""
    defaults = dict(_RANK_DEFAULTS)
    if "OMP_WAIT_POLICY" in environment:  # which libgomp heeds only without the other
        del defaults["GOMP_SPINCOUNT"]
    return defaults | dict(environment)


class Children:
    """Children of this process. Signals of launchers and terminals are not for them."""

    def __init__(self, directory: str) -> None:
        """`directory`: of the run, an argument of every child."""
        self._directory = directory
        self._living: dict[int, int] = {}  # pid -> rank, or DRIVER
        self.ranks: dict[int, socket.socket] = {}  # channels to living ranks
        self.driver_input: int | None = None  # pipes
        self.driver_output: int | None = None

    def __len__(self) -> int:
        """Number of those that live."""
        return len(self._living)

    def start_driver(self) -> None:
        (its_input, self.driver_input), (self.driver_output, its_output) = os.pipe(), os.pipe()
        self._spawn(DRIVER, "hetis.driver.driver", os.environ, its_input, its_output)
        os.close(its_input)
        os.close(its_output)

    def start_rank(self, rank: int, environment: Mapping[str, str]) -> None:
        """Starts the process of a rank. `environment`: with the variables of torchrun."""
        self.ranks[rank], its = socket.socketpair()
        with its:
            self._spawn(rank, "hetis.launch.member", with_defaults(environment), its.fileno(), 1)

    def _spawn(self, child: int, module: str, environment: Mapping[str, str], stdin: int, stdout: int) -> None:
        pid = os.posix_spawn(
            sys.executable,
            start.command(module, self._directory, str(os.getpid())),
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)],
            setsigmask=[signal.SIGTERM, signal.SIGINT],
        )
        self._living[pid] = child

    def reap(self) -> Iterator[tuple[int, int]]:
        """(rank or DRIVER, wait status) of each that has ended since the last call."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                child = self._living.pop(ended[0], None)
                if child is None:  # left by a rank
                    continue
                if child != DRIVER:
                    self.ranks.pop(child).close()
                yield child, ended[1]

    def kill_ranks(self) -> None:
        supervision.kill(pid for pid, child in self._living.items() if child != DRIVER)

    def kill(self) -> None:
        supervision.kill(self._living)

    @staticmethod
    def end_orphans() -> None:
        """Kills what ranks have left: their children are children of this process now."""
        with suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)  # raises if there is none
            import psutil

            supervision.kill(process.pid for process in psutil.Process().children(recursive=True))
            while True:
                os.waitpid(-1, 0)


def rank_environment(rank: int, world_size: int) -> dict[str, str]:
    """Variables as torchrun sets them, for one of `world_size` ranks of this host."""
    values = (rank, rank, world_size, world_size, 0, 1)
    return dict(os.environ) | dict(zip(torchrun.RANK_VARIABLES, map(str, values), strict=True))
