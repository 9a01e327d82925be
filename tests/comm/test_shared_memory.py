"""Counters in shared memory: no waiter misses an event or holds the GIL while it waits."""

import itertools
import os
import threading
from collections.abc import Callable

import pytest
import torch

from hetis.comm import shared_memory
from hetis.comm.shared_memory import PAGE_BYTES, Address, Peer, Segment, Waiter, operations, plain_publish, plain_wait
from tests.comm.comm_helpers import together

Operations = tuple[Callable[[int, int, int, int], bool], Callable[[int], None]]
NATIVE, PLAIN = "native", "plain"


def choose(name: str) -> Operations:
    return (plain_wait, plain_publish) if name == PLAIN else operations()


@pytest.mark.parametrize(("waiting", "publishing"), list(itertools.product([NATIVE, PLAIN], repeat=2)))
def test_no_wake_up_is_lost(waiting: str, publishing: str) -> None:
    """After a lost wake-up, a wait would return False at its time limit."""
    segment = Segment.create(PAGE_BYTES)
    there, back = segment.word(0), segment.word(1)
    (wait, publish_back), (wait_there, publish) = choose(waiting), choose(publishing)

    def first() -> None:
        for i in range(500):
            publish(there)
            assert wait(back, i, 0, 20_000)

    def second() -> None:
        for i in range(500):
            assert wait_there(there, i, 0, 20_000)
            publish_back(back)

    together(first, second)


@pytest.mark.parametrize("name", [NATIVE, PLAIN])
def test_waiting_releases_the_gil(name: str) -> None:
    """Events can be counted, and the waiter woken, only if the waiting thread has released the GIL."""
    wait, publish = choose(name)
    segment = Segment.create(PAGE_BYTES)
    word = segment.word(0)
    ticks = itertools.count()
    waiting = threading.Event()

    def wait_long() -> bool:
        waiting.set()
        return wait(word, 0, 0, 20_000)

    def count_then_wake() -> None:
        waiting.wait()
        while next(ticks) < 10_000:
            pass
        publish(word)

    assert together(wait_long, count_then_wake)[0] is True
    assert next(ticks) > 10_000


@pytest.mark.parametrize("name", [NATIVE, PLAIN])
def test_wait_returns_false_at_its_limit_and_counters_wrap(name: str) -> None:
    wait, publish = choose(name)
    segment = Segment.create(PAGE_BYTES)
    word = segment.word(3)
    assert not wait(word, 0, 0, 1)
    segment.memory_B.view(torch.int32)[3 * 32] = -1
    assert not wait(word, 2**32 - 1, 0, 1)
    publish(word)
    assert wait(word, 2**32 - 1, 0, 1)
    assert not wait(word, 0, 1000, 1)


def test_a_change_made_before_the_peer_died_is_not_lost() -> None:
    """An event between the end of a wait and the check of the peer is seen."""
    segment = Segment.create(PAGE_BYTES)
    word = segment.word(0)
    waiter = Waiter(0)

    def publish_and_die() -> None:
        waiter.publish(word)
        raise ConnectionError("gone")

    waiter.wait(word, 0, publish_and_die)
    with pytest.raises(ConnectionError, match="gone"):
        waiter.wait(word, 1, lambda: (_ for _ in ()).throw(ConnectionError("gone")))


def test_attached_memory_is_the_same_memory() -> None:
    segment = Segment.create(2 * PAGE_BYTES)
    other = Segment.attach(segment.address)
    segment.memory_B[5000] = 7
    assert other.memory_B[5000] == 7
    address = segment.address
    segment.close()
    segment.close()
    assert other.memory_B[5000] == 7
    with pytest.raises(ConnectionError):
        Segment.attach(Address(address.pid, 10_000, address.num_bytes))


def test_a_pid_without_a_process_is_dead() -> None:
    gone = Peer(3, 2**22 - 1)
    assert not gone.is_alive()
    with pytest.raises(ConnectionError, match="rank 3"):
        gone.check()
    assert Peer(0, os.getpid()).is_alive()


def test_ranks_spin_only_if_cores_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert shared_memory.default_spin_us() > 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores + 1))
    assert shared_memory.default_spin_us() == 0
