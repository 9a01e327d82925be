"""A fleet whose devices and links are measured before it is up."""

from hetis.core import messages as m
from hetis.core.measurements import AttentionSample, DenseSample, PrefillSample, TransferSample
from tests.driver.scripted import AGENT, ATTACH, END, FRONT, OTHER_FRONT, Script, Sockets, run


def measured(rank: int, message: m.Measure | m.MeasureLink) -> m.Measured:
    sizes = [2**k for k in range(4, 16)]
    if isinstance(message, m.MeasureLink):
        ways = [TransferSample(n, 10 + 1e-3 * n) for n in sizes] if rank == message.primary else []
        return m.Measured(rank=rank, seconds=0.1, request=ways, reply=ways)
    if message.part == "attention":
        points = [(h, n) for h in (2, 8, 32) for n in (1000, 50_000, 1_000_000)]
        times = [AttentionSample(h, n, 5 + 0.1 * h + 1e-4 * n) for h, n in points]
        return m.Measured(rank=rank, seconds=0.1, read_bytes_per_us=100.0, attention=times)
    dense = [DenseSample(n, max(10.0, 0.5 * n)) for n in sizes]
    return m.Measured(rank=rank, seconds=0.1, dense=dense, prefill=[PrefillSample(n, 1.0 * n) for n in sizes])


def start_measuring(sockets: Sockets) -> Script:
    """Up to the first messages about it, which are not taken."""
    sockets.put("front", FRONT, ATTACH)
    sockets.hello(0)
    sockets.hello(1)
    yield None
    for rank in (b"0", b"1"):
        assert [type(message) for message in sockets.take("ranks", rank)] == [m.Setup]
        sockets.ready(int(rank))
    yield None


def test_a_fleet_is_up_when_all_is_measured(sockets: Sockets) -> None:
    def script() -> Script:
        yield from start_measuring(sockets)
        sockets.put("front", OTHER_FRONT, m.ProfileQuery())  # to be answered when there is a profile
        num_measured = 0
        while asked := [(rank, each) for rank in (0, 1) for each in sockets.take("ranks", str(rank).encode())]:
            assert all(isinstance(message, m.Measuring) for message in sockets.take("front", FRONT))
            assert sockets.take("front", OTHER_FRONT) == []
            for rank, message in asked:
                num_measured += 1
                sockets.put("ranks", str(rank).encode(), measured(rank, message))
            yield None
        assert num_measured >= 4, "attention, dense, and a link at both ends"
        assert [type(message) for message in sockets.take("front", FRONT)][-1] is m.EngineReady
        sockets.put("front", FRONT, m.ProfileQuery())
        yield None
        (report,) = sockets.take("front", FRONT)
        assert sockets.take("front", OTHER_FRONT) == [report]
        assert sorted(report.profile.devices) == [0, 1]
        assert [(link.primary, link.worker) for link in report.profile.links] == [(0, 1)]
        yield END

    run(sockets, script(), dispatch="hetis")


def test_measuring_can_be_asked_for_where_placement_does_not_depend_on_it(sockets: Sockets) -> None:
    def script() -> Script:
        yield from start_measuring(sockets)
        assert [type(message) for message in sockets.take("ranks", b"0")] == [m.Measure]
        yield END

    run(sockets, script(), dispatch="even", measure=True)


def test_a_fleet_that_is_shut_down_while_it_measures_ends_its_ranks(sockets: Sockets) -> None:
    """Ranks read messages when they have measured; their agents end those that take too long."""

    def script() -> Script:
        sockets.put("agents", AGENT, m.AgentHello(ranks=[0, 1]))
        yield from start_measuring(sockets)
        assert [type(message) for message in sockets.take("ranks", b"0")] == [m.Measure]
        yield END

    run(sockets, script(), dispatch="hetis")
    assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [m.Shutdown()]
    assert sockets.take("agents", AGENT) == [m.End(reason=None)]
