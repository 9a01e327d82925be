"""Notes are found by those who wait for them, and the right store is joined."""

from functools import partial

import pytest

from hetis.comm.rendezvous import LocalRendezvous, StoreRendezvous
from tests.comm.comm_helpers import Ranks, together


def test_a_note_reaches_a_rank_that_waits() -> None:
    rendezvous = LocalRendezvous()
    note = bytes(range(256))
    found = together(partial(rendezvous.get, "a"), partial(rendezvous.get, "a"), partial(rendezvous.set, "a", note))
    assert found[:2] == [note, note]
    assert rendezvous.get("a", 0.0) == note


def test_missing_note_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"'link/0-3' .* 0\.01 s"):
        LocalRendezvous().get("link/0-3", 0.01)


def test_runs_and_restarts_do_not_see_each_others_notes(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_missing_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.setenv(other, "1")
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=name):
        StoreRendezvous.from_environment()
