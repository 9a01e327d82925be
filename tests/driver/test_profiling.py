"""Which rank measures what, and when, on fleets with known speeds."""

from itertools import pairwise

import msgspec
import pytest

from hetis.core.messages import MeasureLink
from hetis.core.profile import FleetProfile, LayerShare
from hetis.cost.needs import usable_share
from hetis.driver.profiling import Profiling, layer_share, report_of
from tests.engine.measured_fleet import SPEC, Fleet, answer, make_plan

CPU = ("a", "cpu", "small")


def test_ranks_of_one_key_are_measured_once_and_links_each() -> None:
    fleet = Fleet(make_plan([1], 3), [CPU, CPU, ("b", "cpu", "small"), ("b", "cpu", "large")])
    profiling = fleet.run()
    assert fleet.who("attention") == [0, 3]
    assert fleet.who("dense") == [0]
    assert sorted(fleet.links()) == [(0, 1), (0, 2), (0, 3)]
    report = profiling.report()
    assert report.profile is not None
    devices = report.profile.devices
    assert [devices[rank].attention.constant_us for rank in range(4)] == pytest.approx([5.0, 5.0, 5.0, 20.0])
    assert [devices[rank].read_bytes_per_us for rank in range(4)] == [100, 100, 100, 25]
    assert [devices[rank].usable_bytes for rank in range(4)] == [
        int((rank + 1 << 20) * usable_share("cpu")) for rank in range(4)
    ], "memory is each rank's own"
    assert devices[0].layer is not None
    assert [devices[rank].layer for rank in (1, 2, 3)] == [None] * 3
    assert report.sources == {0: "measured in 3.0 s", 1: "as rank 0", 2: "as rank 0", 3: "measured in 2.0 s"}
    assert [(link.primary, link.worker) for link in report.profile.links] == [(0, 1), (0, 2), (0, 3)]
    assert report.profile.links[0].request.alpha_us == pytest.approx(10.0)
    assert {kind.key: len(kind.layers) for kind in profiling.new()} == {fleet.key(0): 1, fleet.key(3): 0}


def test_without_sharing_every_rank_is_measured_by_itself_and_in_turn() -> None:
    fleet = Fleet(make_plan([1], 2), [CPU, CPU, CPU])
    profiling = fleet.run(share=False)
    assert fleet.who("attention") == [0, 1, 2]
    report = profiling.report()
    assert report.profile is not None
    assert [report.profile.devices[rank].attention.constant_us for rank in range(3)] == pytest.approx([5.0, 10.0, 15.0])
    assert set(report.sources.values()) == {"measured in 3.0 s", "measured in 2.0 s"}


def test_gpus_and_hosts_measure_at_the_same_time() -> None:
    fleet = Fleet(
        make_plan([1], 4),
        [
            ("a", "cuda:0", "big"),
            ("a", "cuda:1", "old"),
            ("a", "cpu", "small"),
            ("b", "cpu", "large"),
            ("b", "cpu", "odd"),
        ],
    )
    profiling = Profiling(fleet.setup, {}, share=True)
    first = profiling.start()
    assert [rank for rank, _ in first] == [0, 1, 2, 3], "rank 4 has to wait for the cores of its host"
    assert [rank for rank, _ in profiling.on_measured(answer(3, first[3][1]))] == [4]
    fleet.run()
    assert len(fleet.links()) == 4


def test_primaries_of_a_stage_are_measured_together() -> None:
    """Two kinds of devices in one stage; the second stage has nothing new, the third splits its layer otherwise."""
    where = [("a", "cuda:0", "big"), ("a", "cuda:1", "old"), ("b", "cuda:0", "big"), ("b", "cuda:1", "big")]
    fleet = Fleet(make_plan([2, 2, 1], 1), [*where, ("c", "cuda:0", "big"), ("c", "cpu", "small")])
    profiling = fleet.run()
    assert fleet.who("attention") == [0, 1, 5]
    assert sorted(fleet.who("dense")) == [0, 1, 4]
    place = [rank for rank, _ in fleet.asked].index(1, 2)
    assert [rank for rank, _ in fleet.asked[place - 1 : place + 1]] == [0, 1], "both are asked at the same time"
    report = profiling.report()
    assert report.profile is not None
    layers = [report.profile.devices[rank].layer for rank in range(5)]
    assert [layer.share.num_ranks for layer in layers if layer is not None] == [2, 2, 2, 2, 1]
    assert layers[0] == layers[2] == layers[3] != layers[1]
    assert {kind.key: len(kind.layers) for kind in profiling.new()} == {
        fleet.key(0): 2,
        fleet.key(1): 1,
        fleet.key(5): 0,
    }
    assert report.profile.links[-1].worker == 5
    assert len(fleet.links()) == 5


def test_what_the_cache_has_is_not_measured_again() -> None:
    fleet = Fleet(make_plan([1], 2), [CPU, CPU, ("b", "cpu", "large")])
    known = {profile.key: profile for profile in fleet.run().new()}
    assert known.keys() == {fleet.key(0), fleet.key(2)}
    again = fleet.run(known)
    assert fleet.who("attention") == fleet.who("dense") == []
    assert sorted(fleet.links()) == [(0, 1), (0, 2)], "links are measured fast, and depend on the hosts"
    assert again.new() == []
    report = again.report()
    assert report.sources == dict.fromkeys(range(3), "cache")
    assert report.profile is not None
    assert report.profile.devices[1].attention == known[fleet.key(0)].attention
    assert report.profile.devices[1].layer is None


def test_a_cached_worker_lacks_the_layers_and_another_split_needs_them_anew() -> None:
    fleet = Fleet(make_plan([1], 0), [CPU])
    [whole] = fleet.run().new()
    [layer] = whole.layers
    worker = msgspec.structs.replace(whole, layers=())
    profiling = fleet.run({whole.key: worker})
    assert (fleet.who("attention"), fleet.who("dense")) == ([], [0])
    assert profiling.new() == [whole]
    split = Fleet(make_plan([2], 0), [CPU, CPU])
    profiling = split.run({whole.key: whole})
    assert (split.who("attention"), split.who("dense")) == ([], [0, 1])
    [both] = profiling.new()
    assert both.layers[0] == layer, "the known layer is kept"
    assert [layer.share.num_ranks for layer in both.layers] == [1, 2]
    assert both.attention == whole.attention
    for again in (fleet, split):
        assert again.run({whole.key: both}).new() == []
        assert again.who("dense") == []


def test_layers_of_another_model_are_measured_anew_and_attention_is_not() -> None:
    fleet = Fleet(make_plan([1], 1), [CPU, CPU])
    [known] = fleet.run().new()
    larger = msgspec.structs.replace(SPEC, hidden_size=128)
    fleet.setup = msgspec.structs.replace(fleet.setup, spec=larger)
    profiling = fleet.run({known.key: known})
    assert (fleet.who("attention"), fleet.who("dense")) == ([], [0])
    [both] = profiling.new()
    assert [layer.share for layer in both.layers[1:]] == [layer_share(fleet.setup, 0)]
    assert profiling.report().sources == {0: "measured in 1.0 s", 1: "cache"}


def test_ranks_that_split_layers_unevenly_have_layers_of_their_own() -> None:
    plan = make_plan([2], 0)
    first, second = plan.stages[0].primaries
    primaries = (
        msgspec.structs.replace(first, groups=(0, 3)),
        msgspec.structs.replace(second, groups=(3, 4)),
    )
    stage = msgspec.structs.replace(plan.stages[0], primaries=primaries)
    fleet = Fleet(msgspec.structs.replace(plan, stages=(stage,)), [CPU, CPU])
    profiling = fleet.run()
    profile = profiling.report().profile
    assert profile is not None
    assert [device.layer and device.layer.share for device in profile.devices.values()] == [
        LayerShare(num_ranks=2, num_groups=groups, num_weights=layer_share(fleet.setup, rank).num_weights)
        for rank, groups in enumerate((3, 1))
    ]
    [kind] = profiling.new()
    assert fleet.run({kind.key: kind}).new() == [], "both are kept"


def test_a_primary_without_head_groups_is_measured_without_links_and_prompts() -> None:
    """The last of five primaries for four groups has none."""
    fleet = Fleet(make_plan([5], 2), [CPU] * 7)
    profiling = fleet.run()
    assert fleet.who("dense") == [0, 1, 2, 3, 4]
    assert fleet.links() == [(home, worker) for home in range(4) for worker in (5, 6)]
    profile = profiling.report().profile
    assert profile is not None
    layers = [device.layer for device in profile.devices.values()][:5]
    assert [layer and layer.share.num_groups for layer in layers] == [1, 1, 1, 1, 0]
    assert [layer and layer.prefill is None for layer in layers] == [False, False, False, False, True]
    assert report_of(profile, fleet.setup, "fleet.json").profile == profile
    [kind] = profiling.new()
    assert fleet.run({kind.key: kind}).report().profile == profile, "the cache has all of it"


def test_a_fleet_without_workers_has_no_links() -> None:
    fleet = Fleet(make_plan([1], 0), [CPU])
    report = fleet.run().report()
    assert report.profile is not None
    assert (list(report.profile.devices), report.profile.links) == ([0], ())


# --- profiles from files ----------------------------------------------------------------------------------------------


def full_profile(fleet: Fleet) -> FleetProfile:
    profile = fleet.run().report().profile
    assert profile is not None
    return profile


def test_a_complete_file_is_used_as_it_is() -> None:
    fleet = Fleet(make_plan([1], 2), [CPU, CPU, CPU])
    profile = full_profile(fleet)
    report = report_of(profile, fleet.setup, "fleet.json")
    assert report.profile == profile
    assert set(report.sources.values()) == {"fleet.json"}


@pytest.mark.parametrize(
    ("without", "lacking"),
    [
        ("rank", r"fleet\.json lacks rank 1"),
        ("layers", r"lacks layers of rank 0"),
        ("link", r"lacks link 0->2"),
    ],
)
def test_ranks_layers_and_links_that_a_file_lacks_are_named(without: str, lacking: str) -> None:
    fleet = Fleet(make_plan([1], 2), [CPU, CPU, CPU])
    profile = full_profile(fleet)
    devices, links = dict(profile.devices), list(profile.links)
    if without == "rank":
        del devices[1]
    elif without == "layers":
        devices[0] = msgspec.structs.replace(devices[0], layer=None)
    else:
        links.pop()
    with pytest.raises(ValueError, match=lacking):
        report_of(FleetProfile(devices=devices, links=tuple(links)), fleet.setup, "fleet.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype is float32 in the file and bfloat16 here"),
        ({"block_size": 32}, "page_size is 16 in the file and 32 here"),
        ({"enforce_eager": True}, "enforce_eager is False in the file and True here"),
        ({"spec": msgspec.structs.replace(SPEC, num_query_heads=4)}, "queries_per_group is 2 in the file and 1 here"),
        ({"spec": msgspec.structs.replace(SPEC, head_dim=128)}, "head_dim is 64 in the file and 128 here"),
        ({"spec": msgspec.structs.replace(SPEC, hidden_size=128)}, "num_weights is"),
    ],
)
def test_a_file_for_other_settings_is_refused(change: dict[str, object], said: str) -> None:
    fleet = Fleet(make_plan([1], 1), [CPU, CPU])
    profile = full_profile(fleet)
    other = msgspec.structs.replace(fleet.setup, **change)
    with pytest.raises(ValueError, match=rf"fleet\.json does not hold for rank 0: its {said}.*run `hetis profile`"):
        report_of(profile, other, "fleet.json")


def test_a_file_for_other_devices_or_another_split_is_refused() -> None:
    one, two = Fleet(make_plan([1], 2), [CPU, CPU, CPU]), Fleet(make_plan([2], 1), [CPU, CPU, CPU])
    large = Fleet(one.setup.plan, [CPU, CPU, ("b", "cpu", "large")])
    with pytest.raises(ValueError, match="rank 2: its device is small, 1 thread in the file and large, 1 thread"):
        report_of(full_profile(one), large.setup, "fleet.json")
    whole, split = full_profile(one), full_profile(two)
    layers = msgspec.structs.replace(split.devices[0], layer=whole.devices[0].layer)
    devices = {**split.devices, 0: layers}
    with pytest.raises(ValueError, match="rank 0: its num_ranks is 1 in the file and 2 here"):
        report_of(msgspec.structs.replace(split, devices=devices), two.setup, "fleet.json")


def test_links_of_all_stages() -> None:
    fleet = Fleet(make_plan([1, 2], 2), [CPU] * 5)
    fleet.run()
    links = [(message.primary, message.worker) for _, message in fleet.asked if isinstance(message, MeasureLink)]
    assert links == [pair for pair in ((0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)) for _ in pair]


def test_progress_counts_one_measurement_at_a_time() -> None:
    fleet = Fleet(make_plan([2], 2), [CPU, ("a", "cpu", "large"), ("b", "cpu", "small"), ("c", "cpu", "small")])
    profiling = Profiling(fleet.setup, {}, share=True)
    assert profiling.num_jobs == 2 + 1 + 4, "two kinds of devices, a stage, links"
    busy, done = dict(profiling.start()), [profiling.num_done]
    while busy:
        rank = min(busy)
        busy |= dict(profiling.on_measured(answer(rank, busy.pop(rank))))
        done.append(profiling.num_done)
    assert (done[0], done[-1]) == (0, profiling.num_jobs)
    assert all(after - before in (0, 1) for before, after in pairwise(done))
