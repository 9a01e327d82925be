"""Profiles in files, the cache, and errors for files that cannot be used."""

from pathlib import Path

import msgspec
import pytest

from hetis.core.profile import (
    AttentionProfile,
    DenseProfile,
    DeviceProfile,
    FleetProfile,
    KindProfile,
    LayerProfile,
    LayerShare,
    LinkProfile,
    PrefillProfile,
    ProfileKey,
    TransferProfile,
)
from hetis.driver.profile_files import cache_folder, cached, keep_profiles, load, save

KEY = ProfileKey(
    device="NVIDIA A100-SXM4-80GB",
    driver="550.1",
    dtype="bfloat16",
    head_dim=128,
    queries_per_group=8,
    page_size=32,
    backend="triton",
    enforce_eager=False,
    version="0.1.0",
)
LAYER = LayerProfile(
    share=LayerShare(num_ranks=2, num_groups=4, num_weights=100_000_000),
    dense=DenseProfile(fixed_us=12.0, us_per_weight_byte=7e-7, us_per_flop=4e-9, accuracy=0.95),
    prefill=PrefillProfile(fixed_us=9.0, us_per_pair=1e-4),
)
DEVICE = DeviceProfile(
    key=KEY,
    attention=AttentionProfile(us_per_head=0.01, us_per_byte=7e-7, constant_us=8.0, floor_us=11.5, accuracy=0.97),
    read_bytes_per_us=1.4e6,
    usable_bytes=60 << 30,
    layer=LAYER,
)
KIND = KindProfile(key=KEY, attention=DEVICE.attention, read_bytes_per_us=1.4e6, layers=(LAYER,))
LINK = LinkProfile(
    primary=0,
    worker=2,
    request=TransferProfile(alpha_us=6.0, beta_us_per_byte=8e-5, accuracy=0.96),
    reply=TransferProfile(alpha_us=5.0, beta_us_per_byte=9e-5, accuracy=0.94),
)
DAMAGED = (b'{"devices": {"0": {"attention": "fast"}}}', b'{"key": {}}', b"", b"[" * 100_000, b'{"\xff": 0}', b"\xff")


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
            "page_size": 16,
            "backend": "reference",
            "enforce_eager": True,
            "version": "0.2.0",
        }.items()
    ]
    names = {key.file_name for key in (KEY, *others)}
    assert len(names) == 1 + len(KEY.__struct_fields__)
    assert all("/" not in name and name.endswith(".json") for name in names)


def test_the_cache_returns_what_was_measured_for_the_key_and_nothing_else(tmp_path: Path) -> None:
    assert cached(tmp_path, KEY) is None
    save(KIND, tmp_path / KEY.file_name)
    assert cached(tmp_path, KEY) == KIND
    other = msgspec.structs.replace(KEY, dtype="float16")
    save(KIND, tmp_path / other.file_name)
    assert cached(tmp_path, other) is None


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "missing.json", FleetProfile)
    bad = tmp_path / "bad.json"
    for content in DAMAGED:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.json is not a file that `hetis profile` wrote"):
            load(bad, FleetProfile)


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_cache_counts_as_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / KEY.file_name).write_bytes(content)
    assert cached(tmp_path, KEY) is None


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "fleet.json", Path("/proc/none/fleet.json"), Path("")):
        with pytest.raises(ValueError, match=f"profile {path} cannot be written"):
            save(DEVICE, path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_draft_does_not_survive_a_failure(tmp_path: Path) -> None:
    unwritable = msgspec.defstruct("Unwritable", [("field", object)])(object())
    with pytest.raises(TypeError):
        save(unwritable, tmp_path / "fleet.json")
    assert not any(tmp_path.iterdir())


def test_the_cache_follows_xdg() -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/x", "HOME": "/home/me"}) == Path("/x/hetis/profiles")
    assert cache_folder({"HOME": "/home/me"}) == Path("/home/me/.cache/hetis/profiles")
    assert cache_folder({"XDG_CACHE_HOME": "x", "HOME": "/home/me"}) == Path("/home/me/.cache/hetis/profiles")
    assert cache_folder({"XDG_CACHE_HOME": "", "HOME": "me"}) is None
    assert cache_folder({}) is None


def test_without_a_place_for_the_cache_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for home in ("", str(tmp_path / "file")):
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("HOME", home)
        keep_profiles([KIND, KIND])
        [record] = caplog.records
        assert record.getMessage().startswith("measurements are not kept for later starts: ")
        caplog.clear()
