"""Values reach ranks that wait for them, and each run has key space of its own."""

from functools import partial

import pytest

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


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT", "RANK"])
def test_a_missing_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.setenv(other, "1")
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=name):
        StoreRendezvous.from_environment()
