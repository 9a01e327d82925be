"""Profiles keep what they are given, and say what is wrong with a file."""

from pathlib import Path

import msgspec
import pytest

from hetis.core.profile import (
    AttentionProfile,
    DenseProfile,
    DeviceProfile,
    FleetProfile,
    LinkProfile,
    PrefillProfile,
    ProfileKey,
    TransferProfile,
)
from hetis.cost.profile import cache_folder, cached, load, save

KEY = ProfileKey(
    device="NVIDIA A100-SXM4-80GB",
    driver="550.1",
    dtype="bfloat16",
    head_dim=128,
    queries_per_group=8,
    backend="triton",
)
DEVICE = DeviceProfile(
    key=KEY,
    attention=AttentionProfile(a_us_per_head=0.01, b_us_per_byte=7e-7, c_us=8.0, floor_us=11.5, accuracy=0.97),
    read_bytes_per_us=1.4e6,
    usable_bytes=60 << 30,
    dense=DenseProfile(fixed_us=12.0, us_per_weight_byte=7e-7, us_per_flop=4e-9, accuracy=0.95),
    prefill=PrefillProfile(fixed_us=9.0, us_per_pair=1e-4),
)
LINK = LinkProfile(
    primary=0,
    worker=2,
    request=TransferProfile(alpha_us=6.0, beta_us_per_byte=8e-5, accuracy=0.96),
    reply=TransferProfile(alpha_us=5.0, beta_us_per_byte=9e-5, accuracy=0.94),
)


def test_a_fleet_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    fleet = FleetProfile(devices={0: DEVICE, 2: DEVICE}, links=(LINK,))
    path = tmp_path / "deep" / "down" / "fleet.json"
    save(fleet, path)
    assert load(path, FleetProfile) == fleet
    save(fleet, path)
    assert [file.name for file in path.parent.iterdir()] == ["fleet.json"], "no draft is left behind"


def test_every_field_of_the_key_counts() -> None:
    others = [
        msgspec.structs.replace(KEY, **{field: value})
        for field, value in {
            "device": "NVIDIA A100 SXM4-80GB",
            "driver": "550.2",
            "dtype": "float16",
            "head_dim": 64,
            "queries_per_group": 4,
            "backend": "reference",
        }.items()
    ]
    names = {key.file_name for key in (KEY, *others)}
    assert len(names) == 7
    assert all("/" not in name and name.endswith(".json") for name in names)


def test_the_cache_returns_what_was_measured_for_the_key_and_nothing_else(tmp_path: Path) -> None:
    assert cached(tmp_path, KEY) is None
    save(DEVICE, tmp_path / KEY.file_name)
    assert cached(tmp_path, KEY) == DEVICE
    other = msgspec.structs.replace(KEY, dtype="float16")
    save(DEVICE, tmp_path / other.file_name)
    assert cached(tmp_path, other) is None
    (tmp_path / KEY.file_name).write_text('{"key": {}}')
    assert cached(tmp_path, KEY) is None


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "missing.json", FleetProfile)
    bad = tmp_path / "bad.json"
    bad.write_text('{"devices": {"0": {"attention": "fast"}}}')
    with pytest.raises(ValueError, match=r"bad\.json is not a FleetProfile"):
        load(bad, FleetProfile)


def test_the_cache_follows_xdg() -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/x", "HOME": "/home/me"}) == Path("/x/hetis/profiles")
    assert cache_folder({"HOME": "/home/me"}) == Path("/home/me/.cache/hetis/profiles")


def test_predictions_are_the_formulas() -> None:
    attention = DEVICE.attention
    assert attention.time_us(0, 0) == 0
    assert attention.time_us(8, 0) == 11.5
    assert attention.time_us(64, 100_000_000) == pytest.approx(0.64 + 70.0 + 8.0)
    assert DEVICE.dense is not None
    assert DEVICE.dense.time_us(1e8, 1e9) == pytest.approx(12 + 70)
    assert DEVICE.dense.time_us(1e8, 1e11) == pytest.approx(12 + 400)
    assert DEVICE.prefill is not None
    assert DEVICE.prefill.time_us(0) == 0
    assert DEVICE.prefill.time_us(1000) == pytest.approx(9.1)
    assert LINK.request.time_us(10_000) == pytest.approx(6.8)
