"""Links and groups on a GPU: staged messages, page-locked memory, a communicator of NCCL."""

from datetime import timedelta
from functools import partial

import pytest
import torch

from hetis.comm.collectives import GroupTensorParallel
from hetis.comm.links.staged import PageLock
from hetis.comm.process_groups import make_process_group
from hetis.comm.rendezvous import LocalRendezvous
from tests.comm.comm_helpers import open_pair, ping_pong, together

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")
MAX_BYTES = 300_000


@pytest.mark.parametrize("kind", ["staged", "shm", "tcp"])
def test_messages_between_a_gpu_and_a_cpu_arrive_unchanged(kind: str) -> None:
    primary, worker = open_pair(kind, MAX_BYTES, MAX_BYTES, CUDA)
    assert primary.send_buffer(8).device == CUDA
    together(partial(ping_pong, primary, True, MAX_BYTES, 200, 5), partial(ping_pong, worker, False, MAX_BYTES, 200, 5))
    primary.close()
    worker.close()


@pytest.mark.parametrize("kind", ["staged", "shm"])
def test_a_message_has_the_results_of_kernels_queued_before_it(kind: str) -> None:
    """The copy to the host waits for kernels that are still running when `send` is called."""
    primary, worker = open_pair(kind, 1 << 20, 8, CUDA)
    for value in range(1, 6):
        torch.cuda._sleep(20_000_000)
        primary.send_buffer(1 << 20).fill_(value)
        primary.send()
        assert bool((worker.recv(1 << 20) == value).all())
        worker.release()
    primary.close()
    worker.close()


def test_memory_is_page_locked_once_and_a_refusal_leaves_no_error(caplog: pytest.LogCaptureFixture) -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    lock = PageLock(memory, CUDA)
    assert memory.is_pinned()
    assert not caplog.records
    again = PageLock(memory, CUDA)
    assert "does not page-lock" in caplog.text
    assert float(torch.ones(9, device=CUDA).sum()) == 9.0
    again.close()
    assert memory.is_pinned()
    lock.close()
    assert not memory.is_pinned()


def test_a_group_of_one_rank_over_nccl() -> None:
    group = make_process_group(LocalRendezvous(), "single", 0, 1, CUDA, timedelta(seconds=60), num_ctas=2)
    single = GroupTensorParallel(group, [0])
    single.connect(CUDA)
    values = torch.arange(1000.0, device=CUDA)
    single.all_reduce(values)
    assert torch.equal(values.cpu(), torch.arange(1000.0))
    single.close()
