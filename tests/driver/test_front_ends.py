"""What the driver keeps about front ends: ids of their sequences, and questions for the statistics of all ranks."""

from hetis.core.device_info import RankStats
from hetis.core.messages import TokenOutput
from hetis.driver.front_ends import SequenceIds, StatsCollector


def test_outputs_go_back_with_the_ids_that_front_ends_chose() -> None:
    """Whatever the ids look like."""
    ids = SequenceIds()
    sent = [(b"front", "1/0"), (b"other", "1/0"), (b"front", "0:1/0"), (b"", ""), (b"other", ":")]
    outputs = [TokenOutput(id=ids.to_engine(front, own), token_ids=[index]) for index, (front, own) in enumerate(sent)]
    assert len({output.id for output in outputs}) == len(sent)
    found = ids.by_front(outputs)
    assert [(front, output.id) for front in found for output in found[front]] == [
        *((b"front", "1/0"), (b"front", "0:1/0"), (b"other", "1/0"), (b"other", ":"), (b"", "")),
    ]
    assert [output.token_ids for output in found[b"other"]] == [[1], [4]]


def test_statistics_are_those_of_the_last_question() -> None:
    """A second question while ranks still answer the first one, as at the end of a run with a trace."""
    collector = StatsCollector(2)
    assert collector.ask(b"front")
    collector.begin()
    assert not collector.ask(b"other"), "one question serves both"
    assert collector.on_stats(RankStats(rank=0, attention_seconds=1.0)) is None
    collector.begin()
    assert collector.on_stats(RankStats(rank=1)) is None, "to the first question"
    assert collector.on_stats(RankStats(rank=1)) is None
    found = collector.on_stats(RankStats(rank=0, attention_seconds=2.0))
    assert found is not None
    assert (sorted(found), found[0].attention_seconds, collector.num_missing) == ([0, 1], 2.0, 0)
    assert collector.take_asking() == {b"front", b"other"}
    assert collector.take_asking() == set()
