"""The formulas of profiles, and which numbers a file may have."""

from typing import Any

import msgspec
import pytest

from hetis.core.profile import FleetProfile
from tests.driver.test_profile_files import DEVICE, LAYER, LINK

FLEET = FleetProfile(devices={0: DEVICE}, links=(LINK,))


def test_predictions_are_the_formulas() -> None:
    attention = DEVICE.attention
    assert attention.time_us(0, 0) == 0
    assert attention.time_us(8, 0) == 11.5
    assert attention.time_us(64, 100_000_000) == pytest.approx(0.64 + 70.0 + 8.0)
    assert LAYER.dense.time_us(1e8, 1e9) == pytest.approx(12 + 70)
    assert LAYER.dense.time_us(1e8, 1e11) == pytest.approx(12 + 400)
    assert LAYER.prefill.time_us(0) == 0
    assert LAYER.prefill.time_us(1000) == pytest.approx(9.1)
    assert LINK.request.time_us(10_000) == pytest.approx(6.8)


def test_the_terms_of_attention_add_up_to_its_time() -> None:
    attention = DEVICE.attention
    for heads, kv_bytes in ((8, 0), (64, 100_000_000)):
        assert sum(attention.terms_us(heads, kv_bytes)) == pytest.approx(attention.time_us(heads, kv_bytes))
    assert attention.terms_us(8, 0) == [0, 0, 11.5], "where the floor decides"


# --- what a file may say ----------------------------------------------------------------------------------------------


def numbers(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all numbers in a tree of dictionaries and lists."""
    if isinstance(tree, int | float):
        return [] if isinstance(tree, bool) else [path]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, below in items for found in numbers(below, (*path, key))]


def changed(path: tuple[Any, ...], value: object) -> bytes:
    """FLEET as JSON with one value changed."""
    tree = msgspec.json.decode(msgspec.json.encode(FLEET))
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return msgspec.json.encode(tree)


PATHS = numbers(msgspec.json.decode(msgspec.json.encode(FLEET)))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_no_number_is_negative_or_endless(path: tuple[Any, ...]) -> None:
    assert msgspec.json.decode(changed(path, 1), type=FleetProfile)
    wrong = [1e300, float(1 << 63)] if path[-1] == "accuracy" else [-1, -1e-300, 1e300, 1 << 63]
    for value in wrong:
        with pytest.raises(msgspec.ValidationError, match=str(path[-1])):
            msgspec.json.decode(changed(path, value), type=FleetProfile)


def test_attention_takes_time() -> None:
    nothing = {"a_us_per_head": 0, "b_us_per_byte": 0, "c_us": 0, "floor_us": 0}
    with pytest.raises(msgspec.ValidationError, match="takes no time"):
        msgspec.json.decode(changed(("devices", "0", "attention"), nothing), type=FleetProfile)
    for term in nothing:
        assert msgspec.json.decode(changed(("devices", "0", "attention"), nothing | {term: 1}), type=FleetProfile)


@pytest.mark.parametrize("path", [("what",), ("devices", "0", "dense"), ("links", 0, "request", "gamma")], ids=str)
def test_an_unknown_field_is_refused(path: tuple[Any, ...]) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"unknown field `{path[-1]}`"):
        msgspec.json.decode(changed(path, 1), type=FleetProfile)


def test_a_layer_has_attention_of_prompts_if_it_has_head_groups() -> None:
    layer = ("devices", "0", "layer")
    with pytest.raises(msgspec.ValidationError, match="4 head groups has no prefill"):
        msgspec.json.decode(changed((*layer, "prefill"), None), type=FleetProfile)
    with pytest.raises(msgspec.ValidationError, match="0 head groups has a prefill"):
        msgspec.json.decode(changed((*layer, "share", "num_groups"), 0), type=FleetProfile)
    idle = msgspec.structs.replace(LAYER, prefill=None, share=msgspec.structs.replace(LAYER.share, num_groups=0))
    fleet = FleetProfile(devices={0: msgspec.structs.replace(DEVICE, layer=idle)})
    assert msgspec.json.decode(msgspec.json.encode(fleet), type=FleetProfile) == fleet


def test_a_layer_is_all_or_nothing() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"layer\.dense"):
        msgspec.json.decode(changed(("devices", "0", "layer", "dense"), None), type=FleetProfile)
