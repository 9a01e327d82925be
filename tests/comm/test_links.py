"""Every kind of link fulfils the same contract; both ends are in this process."""

import socket
import threading
from functools import partial

import msgspec
import pytest
import torch
import zmq

from hetis.comm.links import choose_link, open_link
from hetis.comm.links.base import ALIGNMENT, NUM_BUFFERS, Link
from hetis.comm.links.shm import ShmLink
from hetis.comm.links.tcp import ZERO_COPY_BYTES, Offer
from hetis.comm.rendezvous import LocalRendezvous
from tests.comm.comm_helpers import (
    CPU,
    NAMELESS,
    device_info,
    open_end,
    open_pair,
    ping_pong,
    random_bytes,
    receive,
    shared_memory,
    together,
    transmit,
)

KINDS = ["local", "shm", "tcp", "torchdist", "staged"]
CHECKED_KINDS = ["local", "shm", "tcp"]  # kinds that detect different sizes at the ends


@pytest.mark.parametrize("kind", KINDS)
def test_messages_of_any_size_arrive_unchanged(kind: str) -> None:
    primary, worker = open_pair(kind, 5000, 5000)
    together(partial(ping_pong, primary, True, 5000, 50, 3), partial(ping_pong, worker, False, 5000, 50, 3))
    assert primary.bytes_sent == worker.bytes_received == primary.bytes_received == worker.bytes_sent > 0
    primary.close()
    worker.close()


@pytest.mark.parametrize("kind", KINDS)
def test_senders_may_be_one_message_ahead_in_both_directions(kind: str) -> None:
    big = 600_000  # more than a socket takes at once
    primary, worker = open_pair(kind, big, big)
    messages = [random_bytes(big, seed) for seed in range(NUM_BUFFERS)]
    for end in (primary, worker):
        for message in messages:
            transmit(end, message)
    for got in together(
        lambda: [receive(worker, big) for _ in messages], lambda: [receive(primary, big) for _ in messages]
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, messages, strict=True))


@pytest.mark.parametrize("kind", ["local", "shm"])
def test_a_third_message_waits_for_a_free_buffer(kind: str) -> None:
    primary, worker = open_pair(kind, 8, 8)
    for value in range(NUM_BUFFERS):
        primary.send_buffer(8).fill_(value)
        primary.send()
    order: list[str] = []
    started = threading.Event()

    def send_third() -> None:
        started.set()
        buffer = primary.send_buffer(8)
        order.append("written")
        buffer.fill_(2)
        primary.send()

    def receive_all() -> list[int]:
        started.wait()
        values = [int(worker.recv(8)[0])]
        order.append("released")
        worker.release()
        return values + [int(receive(worker, 8)[0]) for _ in range(2)]

    _, values = together(send_third, receive_all)
    assert order == ["released", "written"]
    assert values == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_are_aligned_bytes_of_the_requested_size(kind: str) -> None:
    primary, worker = open_pair(kind, 1001, 77)
    for _ in range(3):
        buffer = primary.send_buffer(1000)
        primary.send()
        view = worker.recv(1000)
        for tensor in (buffer, view):
            assert tensor.shape == (1000,)
            assert tensor.dtype == torch.uint8
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % ALIGNMENT == 0
        worker.release()


@pytest.mark.parametrize("kind", ["local", "shm", "tcp"])
def test_messages_sent_before_closing_still_arrive(kind: str) -> None:
    primary, worker = open_pair(kind, 100, 100)
    transmit(primary, random_bytes(100, 1))
    primary.close()
    primary.close()
    assert torch.equal(receive(worker, 100), random_bytes(100, 1))
    with pytest.raises(ConnectionError, match="rank 0"):
        worker.recv(100)
    worker.close()


@pytest.mark.parametrize("kind", ["local", "shm"])
def test_closing_wakes_a_sender_that_waits_for_a_buffer(kind: str) -> None:
    primary, worker = open_pair(kind, 4, 4)
    for _ in range(NUM_BUFFERS):
        transmit(primary, torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ConnectionError, match="rank 1"):
        together(lambda: primary.send_buffer(4), worker.close)


def test_a_tcp_sender_with_full_buffers_detects_a_closed_peer() -> None:
    primary, worker = open_pair("tcp", 20_000_000, 4)

    def send_often() -> None:
        for _ in range(2 * NUM_BUFFERS):
            primary.send_buffer(20_000_000)
            primary.send()
            worker.close()

    with pytest.raises(ConnectionError, match="rank 1"):
        send_often()
    primary.close()


@pytest.mark.parametrize("kind", KINDS)
def test_messages_above_the_limit_are_refused(kind: str) -> None:
    primary, worker = open_pair(kind, 100, 50)
    with pytest.raises(AssertionError, match="51 bytes"):
        worker.send_buffer(51)
    with pytest.raises(AssertionError, match="101 bytes"):
        worker.recv(101)
    primary.close()


@pytest.mark.parametrize("kind", CHECKED_KINDS)
def test_different_sizes_at_the_ends_are_detected(kind: str) -> None:
    primary, worker = open_pair(kind, 100, 100)
    transmit(primary, random_bytes(60, 1))
    transmit(primary, random_bytes(60, 2))
    with pytest.raises(AssertionError, match="expected a message of 59 bytes, the peer sent 60"):
        worker.recv(59)


def test_shm_counters_wrap_around() -> None:
    primary, worker = open_pair("shm", 80, 80)
    assert isinstance(primary, ShmLink)
    assert isinstance(worker, ShmLink)
    start = 2**32 - 3
    words = primary.segment.memory_B[: 6 * 128].view(torch.int32)
    for channel in (0, 3):  # published and released of either direction
        words[channel * 32] = words[(channel + 1) * 32] = start - 2**32
    for link in (primary, worker):
        link._in.count = link._out.count = start
    together(partial(ping_pong, primary, True, 80, 20, 5), partial(ping_pong, worker, False, 80, 20, 5))


def test_a_staged_link_releases_host_buffers_before_it_waits() -> None:
    """Both ends repeatedly send twice before they receive; a host buffer that is not released would block them."""
    primary, worker = open_pair("staged", 16, 16)

    def exchange(link: Link, first: int) -> None:
        for i in range(first, first + 40, 2):
            for value in (i, i + 1):
                link.send_buffer(16).fill_(value)
                link.send()
            for value in (i, i + 1):
                assert int(link.recv(16)[15]) == value
                link.release()

    together(partial(exchange, primary, 0), partial(exchange, worker, 0))


def test_opening_without_a_peer_names_the_key_and_unknown_kinds_are_refused() -> None:
    for kind in ("shm", "tcp", "local", "torchdist"):
        with pytest.raises(TimeoutError, match="link/0-1"):
            open_link(
                kind,
                LocalRendezvous(),
                primary=device_info(0),
                worker=device_info(1),
                is_primary=False,
                device=CPU,
                max_send_bytes=1,
                max_recv_bytes=1,
                timeout=0.01,
            )
    with pytest.raises(ValueError, match="carrier pigeon"):
        open_end("carrier pigeon", LocalRendezvous(), 0, 1, 1)


def unauthorised_peer(endpoint: str, password: bytes | None) -> zmq.Socket[bytes]:
    """Socket that connects like a worker, with any password or none, and sends a message to the primary."""
    peer = zmq.Context().socket(zmq.PAIR)
    peer.linger, peer.rcvtimeo = 0, 50
    if password is not None:
        peer.plain_username, peer.plain_password = b"hetis", password
    peer.connect(endpoint)
    peer.send(b"ten bytes!")
    return peer


def test_tcp_refuses_peers_without_the_token_and_second_peers() -> None:
    """Some connect before the worker and stay connected; one has the token, but connects after the worker."""
    rendezvous = LocalRendezvous()
    offer = partial(rendezvous.get, "link/0-1/tcp")
    silent = socket.socket()
    peers: list[zmq.Socket[bytes]] = []

    def join_after_peers() -> object:
        endpoint = msgspec.msgpack.decode(offer(), type=Offer).endpoint
        host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
        silent.connect((host, int(port)))
        peers.extend(unauthorised_peer(endpoint, password) for password in (None, b"guess", b"0" * 32))
        return open_end("tcp", rendezvous, 1, 10, 10)

    primary, worker = together(lambda: open_end("tcp", rendezvous, 0, 10, 10), join_after_peers)
    late = msgspec.msgpack.decode(offer(), type=Offer)
    peers.append(unauthorised_peer(late.endpoint, late.token))
    for message in (random_bytes(10, seed) for seed in range(3)):
        for sender, receiver in ((primary, worker), (worker, primary)):
            transmit(sender, message)
            assert torch.equal(receive(receiver, 10), message)
        for peer in peers:
            with pytest.raises(zmq.Again):
                peer.recv()
        peers.pop().close()  # which does not affect the link
    worker.close()
    with pytest.raises(ConnectionError, match="rank 1"):
        primary.recv(10)
    primary.close()
    silent.close()


def test_tcp_buffers_keep_their_message_until_it_is_sent() -> None:
    """More messages than buffers, sent without a copy before one is read; all arrive after the sender has closed."""
    size = 2 * ZERO_COPY_BYTES
    primary, worker = open_pair("tcp", size, 1)
    for seed in range(4 * NUM_BUFFERS):
        transmit(primary, random_bytes(size, seed))
    primary.close()
    for seed in range(4 * NUM_BUFFERS):
        assert torch.equal(receive(worker, size), random_bytes(size, seed))
    worker.close()


def test_tcp_names_the_missing_peer() -> None:
    def open_tcp_at(address: str, is_primary: bool, rendezvous: LocalRendezvous) -> Link:
        return open_link(
            "tcp",
            rendezvous,
            primary=device_info(0, address=address),
            worker=device_info(1),
            is_primary=is_primary,
            device=CPU,
            max_send_bytes=1,
            max_recv_bytes=1,
            timeout=0.05,
        )

    rendezvous = LocalRendezvous()
    with pytest.raises(TimeoutError, match="rank 1"):
        open_tcp_at("127.0.0.1", True, rendezvous)
    with pytest.raises(ConnectionError, match="rank 0"):
        open_tcp_at("127.0.0.1", False, rendezvous)  # its port is closed by now
    for address in ("192.0.2.1", "0.0.0.0", "no such name"):
        with pytest.raises(ValueError, match="give an address of this host"):
            open_tcp_at(address, True, LocalRendezvous())


def test_choice_of_link() -> None:
    here, there = {"host": "a", "pid": 1}, {"host": "b", "pid": 2}
    gpu = partial(device_info, 0, device="cuda:0", nccl="2.28.9", gpu="one")
    cpu = partial(device_info, 1, device="cpu")
    assert choose_link(cpu(**here), cpu(host="a", pid=2)) == "shm"
    assert choose_link(cpu(**here), cpu(**there)) == "tcp"
    assert choose_link(gpu(**here), cpu(host="a", pid=2)) == "shm"
    assert choose_link(gpu(**here), cpu(**there)) == "tcp"
    assert choose_link(cpu(**here), cpu(**here)) == "local"
    assert choose_link(gpu(**here), gpu(**here)) == "local"
    assert choose_link(gpu(**here), cpu(**here)) == "shm"


def test_gpus_are_distinguished_by_uuid() -> None:
    """Names do not tell: every rank may have a cuda:0, and one GPU two names. NCCL refuses two ranks on one GPU."""
    one = partial(device_info, 0, device="cuda:0", nccl="2.28.9", gpu="one", host="a")
    assert choose_link(one(), device_info(1, device="cuda:0", nccl="2.28.9", gpu="two", host="a")) == "torchdist"
    assert choose_link(one(), device_info(1, device="cuda:1", nccl="2.28.9", gpu="one", host="a")) == "shm"
    assert choose_link(one(), device_info(1, device="cuda:0", nccl="2.28.9", gpu="three", host="b")) == "torchdist"


def test_gpus_with_different_or_no_nccl_are_joined_over_cpu_memory() -> None:
    one = partial(device_info, 0, device="cuda:0", nccl="2.28.9", gpu="one", host="a")
    for nccl in ("2.29.3", ""):
        assert choose_link(one(), device_info(1, device="cuda:1", nccl=nccl, gpu="two", host="a")) == "shm"
        assert choose_link(one(), device_info(1, device="cuda:0", nccl=nccl, gpu="two", host="b")) == "tcp"
    assert choose_link(one(nccl=""), device_info(1, device="cuda:1", nccl="", gpu="two", host="a")) == "shm"


def test_shared_memory_has_no_name() -> None:
    before = shared_memory()
    pair = open_pair("shm", 1 << 16, 1 << 16)
    assert sorted(shared_memory()) == sorted([*before, NAMELESS, NAMELESS]), "either end maps it"
    for end in pair:
        end.close()
