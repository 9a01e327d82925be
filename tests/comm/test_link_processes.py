"""Links between processes: transport, death of the peer, no memory left behind."""

import signal
from pathlib import Path

import pytest

from hetis.comm.rendezvous import StoreRendezvous
from tests.comm.comm_helpers import NAMELESS, Ranks, open_end, random_bytes, receive, shared_memory, transmit
from tests.processes.look import DEADLINE


def test_every_kind_carries_random_messages_between_processes() -> None:
    with Ranks("links", [0, 1]) as ranks:
        assert all(text.endswith("ok\n") for text in ranks.finish().values())


@pytest.mark.parametrize("kind", ["shm", "tcp", "torchdist"])
def test_death_of_the_peer_is_an_error_that_names_its_rank(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ranks("echo_once", [1], kind) as ranks:
        for name, value in {**ranks.environment, "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        link = open_end(kind, StoreRendezvous.from_environment(DEADLINE), 0, 64, 64)
        transmit(link, random_bytes(64, 1))
        receive(link, 64)
        ranks.processes[1].send_signal(signal.SIGKILL)
        with pytest.raises(ConnectionError, match="rank 1"):
            link.recv(64)
        link.close()


def test_nothing_is_left_after_both_ends_are_killed(tmp_path: Path) -> None:
    with Ranks("idle_pair", [0, 1], TMPDIR=str(tmp_path)) as ranks:
        rendezvous = StoreRendezvous(ranks.store).within("hetis/test/0")
        for rank in (0, 1):
            rendezvous.get(f"ready/{rank}", DEADLINE)
        names = [set(shared_memory(process.pid)) for process in ranks.processes.values()]
        assert names == [{NAMELESS}] * 2
        for process in ranks.processes.values():
            process.kill()
            process.wait()
        assert list(tmp_path.iterdir()) == []
