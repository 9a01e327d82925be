"""Ranks get the same host name iff they can map each other's memory, even if hosts have equal ids."""

import os
from functools import partial
from pathlib import Path

import msgspec
import pytest

from hetis.comm.hosts import Claim, Token, is_visible
from hetis.comm.rendezvous import LocalRendezvous
from hetis.comm.shared_memory import PAGE_BYTES, Address, Segment
from hetis.processes import supervision
from tests.comm.comm_helpers import NAMELESS, shared_memory, together
from tests.processes.look import DEADLINE


def claim_of(rendezvous: LocalRendezvous, rank: int) -> Claim:
    return msgspec.msgpack.decode(rendezvous.get(f"host/{rank}", 1.0), type=Claim)


def names(monkeypatch: pytest.MonkeyPatch, machines: str) -> list[str]:
    """Host name of each rank; `machines` has a letter per rank, its real host, whose memory no other host can map."""
    rendezvous, attach = LocalRendezvous(), Segment.attach
    tokens = [Token(rank, rendezvous) for rank in range(len(machines))]
    machine_of = {claim_of(rendezvous, rank).memory: machine for rank, machine in enumerate(machines)}

    def name_of(rank: int) -> str:
        def attach_here(address: Address) -> Segment:
            if machine_of[address] != machines[rank]:
                raise ConnectionError("no such process")
            return attach(address)

        monkeypatch.setattr(Segment, "attach", attach_here)
        return tokens[rank].host(1.0)

    found = [name_of(rank) for rank in range(len(machines))]
    for token in tokens:
        token.close()
    return found


@pytest.mark.parametrize("machines", ["A", "AAAA", "AB", "ABBA", "ABCBCA", "AABBCC"])
def test_hosts_restored_from_one_snapshot_get_different_names(machines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = names(monkeypatch, machines)
    for one, its in zip(found, machines, strict=True):
        assert [name == one for name in found] == [machine == its for machine in machines]
        assert (one == supervision.host_id()) == (its == "A"), "rank 0 is on the driver's host"


def test_another_token_in_the_claimed_memory_is_another_host() -> None:
    rendezvous = LocalRendezvous()
    first = Token(0, rendezvous)
    Segment.attach(claim_of(rendezvous, 0).memory).memory_B.zero_()
    assert Token(1, rendezvous).host(1.0) != first.host()


@pytest.mark.parametrize("kind", ["pipe", "file", "nothing"])
def test_unrelated_descriptors_are_not_taken_for_the_claimed_memory(kind: str, tmp_path: Path) -> None:
    """On another virtual machine the same pid and descriptor may be anything."""
    path = tmp_path / "short"
    path.write_bytes(b"short")
    reader, writer = os.pipe()
    descriptor = {"pipe": reader, "file": os.open(path, os.O_RDWR), "nothing": 987_654}[kind]
    address = Address(os.getpid(), descriptor, PAGE_BYTES)
    assert not is_visible(Claim("host", bytes(16), address))
    assert path.read_bytes() == b"short"
    os.close(reader)
    os.close(writer)


def test_memory_of_hosts_with_other_ids_is_not_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    rendezvous = LocalRendezvous()
    monkeypatch.setattr(supervision, "host_id", lambda: "elsewhere")
    Token(0, rendezvous)
    monkeypatch.undo()
    monkeypatch.setattr(Segment, "attach", None)
    assert Token(1, rendezvous).host(1.0) == supervision.host_id()


def test_a_missing_rank_is_named_and_no_memory_is_left() -> None:
    before = shared_memory()
    token = Token(1, LocalRendezvous())
    assert sorted(shared_memory()) == sorted([*before, NAMELESS])
    with pytest.raises(TimeoutError, match="host/0"):
        token.host(0.01)
    token.close()


def test_ranks_that_join_concurrently_agree() -> None:
    rendezvous = LocalRendezvous()
    found = together(*[partial(lambda rank: Token(rank, rendezvous).host(DEADLINE), rank) for rank in range(4)])
    assert found == [supervision.host_id()] * 4
