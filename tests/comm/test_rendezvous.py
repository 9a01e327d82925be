"""Values reach ranks that wait for them, and each run has key space of its own."""

import socket
from datetime import timedelta
from functools import partial

import pytest

from hetis.comm import rendezvous as rendezvous_module
from hetis.comm.rendezvous import LocalRendezvous, StoreRendezvous
from tests.comm.comm_helpers import Ranks, together


def test_a_value_reaches_ranks_that_wait() -> None:
    rendezvous = LocalRendezvous()
    value = bytes(range(256))
    found = together(partial(rendezvous.get, "a"), partial(rendezvous.get, "a"), partial(rendezvous.set, "a", value))
    assert found[:2] == [value, value]
    assert rendezvous.get("a", 0.0) == value


def test_a_missing_key_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"'link/0-3' .* 0\.01 s"):
        LocalRendezvous().get("link/0-3", 0.01)


def test_runs_and_restarts_do_not_see_each_others_values(monkeypatch: pytest.MonkeyPatch) -> None:
    with Ranks("unused", []) as ranks:
        for name, value in {**ranks.environment, "RANK": "5"}.items():
            monkeypatch.setenv(name, value)
        first = StoreRendezvous.from_environment(5.0)
        first.set("key", b"first")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        second = StoreRendezvous.from_environment(5.0)
        with pytest.raises(TimeoutError):
            second.get("key", 0.0)
        assert StoreRendezvous(ranks.store).within("hetis/test/0").get("key") == b"first"
        assert first.get("key") == b"first"


def test_a_store_of_torchrun_that_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs before torchrun starts a rank; the time for other operations is another one."""
    with Ranks("unused", []) as ranks:
        for name, value in {**ranks.environment, "RANK": "5", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
            monkeypatch.setenv(name, value)
        assert StoreRendezvous.from_environment(200.0).store.underlying_store.timeout == timedelta(seconds=200)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("MASTER_PORT", str(closed.getsockname()[1]))
    monkeypatch.setattr(rendezvous_module, "CONNECT_SECONDS", 0.2)
    with pytest.raises(ConnectionError, match=r"cannot be reached \(.*\): if rank 0 has ended, its output says why\."):
        StoreRendezvous.from_environment()


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT", "RANK"])
def test_a_missing_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.setenv(other, "1")
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=name):
        StoreRendezvous.from_environment()
