"""Measurement of links: samples, end of both sides, and a clean link afterwards, without assertions on speed."""

import threading
from collections.abc import Iterator

import pytest
import torch

from hetis.comm.links.base import Link
from hetis.comm.links.local import local_pair
from hetis.comm.links.staged import StagedLink
from hetis.ranks.measuring.links import NUM_SIZES, answer_probes, probe_link
from tests.processes.look import DEADLINE

CPU = torch.device("cpu")
SMALLEST, LARGEST = (96, 40), (96 * 500 + 17, 40 * 64)


@pytest.fixture(params=["local", "staged"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Link, Link]]:
    """(primary's end, worker's end)"""
    primary, worker = local_pair(*LARGEST)
    if request.param == "staged":  # as between a GPU and a CPU
        yield StagedLink(primary, CPU, *LARGEST), worker
    else:
        yield primary, worker
    primary.close()
    worker.close()


def test_both_directions_from_a_lane_to_the_largest_message(ends: tuple[Link, Link]) -> None:
    primary, worker = ends
    server = threading.Thread(target=answer_probes, args=(worker, CPU))
    server.start()
    request, reply = probe_link(primary, CPU, SMALLEST, LARGEST, 0.05)
    server.join(DEADLINE)
    assert not server.is_alive()
    for samples, lane_bytes, max_bytes in zip((request, reply), SMALLEST, LARGEST, strict=True):
        sizes = [sample.num_bytes for sample in samples]
        assert sizes == sorted(sizes)
        assert sizes[0] == lane_bytes
        assert all(size % lane_bytes == 0 for size in sizes)
        assert max_bytes - lane_bytes < sizes[-1] <= max_bytes or len(sizes) < NUM_SIZES
        assert all(sample.time_us > 0 for sample in samples)
        assert len(samples) >= 8, "enough for a fit"
    primary.send_buffer(3).copy_(torch.tensor([1, 2, 3], dtype=torch.uint8))
    primary.send()
    assert worker.recv(3).tolist() == [1, 2, 3], "no message is left on the link"
    worker.release()


def test_a_closed_peer_ends_the_measurement(ends: tuple[Link, Link]) -> None:
    primary, worker = ends
    worker.close()
    with pytest.raises(ConnectionError):
        probe_link(primary, CPU, SMALLEST, LARGEST, 0.05)
