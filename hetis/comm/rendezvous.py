"""Key-value store in which ranks publish addresses, process ids and descriptors at start."""

import os
import time
from datetime import timedelta
from typing import Any, Protocol

from torch.distributed import HashStore, PrefixStore, TCPStore

DEFAULT_TIMEOUT = 300.0  # seconds
# To connect to torchrun's store: it runs before any rank is started, so it has ended if it cannot be reached.
CONNECT_SECONDS = 20.0
# Seconds between two polls. The store's own wait cannot be interrupted by signals, blocks other threads, and warns.
_MAX_PAUSE = 0.02


class Rendezvous(Protocol):
    """Values by key, each written once and visible to all ranks of one run."""

    @property
    def store(self) -> Any:
        """Underlying store of torch.distributed, for process groups."""

    def set(self, key: str, value: bytes) -> None:
        """Publishes a value."""

    def get(self, key: str, timeout: float | None = None) -> bytes:
        """Value of `key`; waits for it up to `timeout` seconds, then raises TimeoutError, naming the key."""


class StoreRendezvous:
    """Rendezvous over any store of torch.distributed."""

    def __init__(self, store: Any, timeout: float = DEFAULT_TIMEOUT) -> None:
        """`timeout`: seconds that `get` waits by default."""
        self.store = store
        self._timeout = timeout

    @classmethod
    def from_environment(cls, timeout: float = DEFAULT_TIMEOUT) -> "StoreRendezvous":
        """Rendezvous over the store at MASTER_ADDR:MASTER_PORT, with a key space of this run and restart.

        torchrun's agent hosts it (TORCHELASTIC_USE_AGENT_STORE=True) and every rank is a client; without that, rank 0
        hosts. ValueError if a variable is missing.
        """
        address, port, rank = (_environment(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
        agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        try:
            store = TCPStore(
                address,
                int(port),
                is_master=not agent_hosts and rank == "0",
                timeout=timedelta(seconds=min(timeout, CONNECT_SECONDS) if agent_hosts else timeout),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise ConnectionError(
                f"the rendezvous store at {address}:{port} cannot be reached ({_first_line(error)}): if rank 0 has "
                f"ended, its output says why."
            ) from None
        store.set_timeout(timedelta(seconds=timeout))
        run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(PrefixStore(f"hetis/{run}/{restart}", store), timeout)

    def within(self, prefix: str) -> "StoreRendezvous":
        """Rendezvous over the same store, with keys below `prefix`."""
        return StoreRendezvous(PrefixStore(prefix, self.store), self._timeout)

    def set(self, key: str, value: bytes) -> None:
        self.store.set(key, value)

    def get(self, key: str, timeout: float | None = None) -> bytes:
        limit = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        pause = 0.001
        try:
            while not self.store.check([key]):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"no rank set {key!r} at the rendezvous within {limit:g} s.")
                time.sleep(pause)
                pause = min(1.5 * pause, _MAX_PAUSE)
            return bytes(self.store.get(key))
        except RuntimeError as error:
            raise ConnectionError(
                f"the rendezvous store was lost while waiting for {key!r} ({_first_line(error)}): if rank 0 has "
                f"ended, its output says why."
            ) from None


class LocalRendezvous(StoreRendezvous):
    """Rendezvous between threads of one process, for tests."""

    def __init__(self, timeout: float = 10.0) -> None:
        super().__init__(HashStore(), timeout)


def _environment(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ValueError(f"{name} is not set: start ranks with torchrun or `hetis`.")
    return value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
