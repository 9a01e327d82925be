"""Arrays of a step reach the device unchanged, in one copy, and no block is filled while it is being copied."""

import numpy as np
import pytest
import torch

from hetis.ranks import step_arrays
from hetis.ranks.step_arrays import ALIGNMENT, DeviceArrays, HostArrays

CPU = torch.device("cpu")


def arrays_of(seed: int) -> list[np.ndarray]:
    """Some of them empty, not contiguous or of two dimensions."""
    random = np.random.default_rng(seed)
    shapes = [(0,), (1,), (7,), (3, 5), (100,), (0, 4), (33,)]
    arrays = [random.integers(-9, 1 << 30, shape).astype(random.choice([np.int32, np.int64])) for shape in shapes]
    return [*arrays, np.arange(40)[::3], np.arange(12, dtype=np.int32).reshape(3, 4).T]


@pytest.mark.parametrize("num_bytes", [64, 1 << 12])
def test_arrays_arrive_as_they_are(num_bytes: int) -> None:
    """In small blocks, which grow in the middle of a step, and in one that is large enough."""
    staged, plain = DeviceArrays(CPU, num_bytes), HostArrays()
    for step in range(5):
        arrays = arrays_of(step)
        found = [staged.put(array) for array in arrays]
        staged.send()
        for tensor, array in zip(found, arrays, strict=True):
            assert torch.equal(tensor, plain.put(array))
            assert tensor.is_contiguous()
            assert tensor.dtype == torch.from_numpy(np.ascontiguousarray(array)).dtype
            assert tensor.data_ptr() % ALIGNMENT == 0


def test_arrays_of_a_step_stay_until_the_next_one() -> None:
    """More of the same step, another block included, does not touch what came before."""
    staged = DeviceArrays(CPU, 256)
    first = staged.put(np.arange(30))
    second = staged.put(np.arange(300))
    staged.send()
    assert torch.equal(first, torch.arange(30))
    assert torch.equal(second, torch.arange(300))


def test_a_block_is_filled_again_after_its_copy_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        count = 0

        def __init__(self, device: torch.device) -> None:
            self._name = str(Event.count)
            Event.count += 1

        def record(self) -> None:
            log.append(f"copy {self._name}")

        def synchronize(self) -> None:
            log.append(f"wait for {self._name}")

    monkeypatch.setattr(step_arrays, "StreamEvent", Event)
    staged = DeviceArrays(CPU)
    for _ in range(3):
        for array in arrays_of(0):
            staged.put(array)
        staged.send()
    staged.send()  # nothing has been put: nothing is copied
    assert log == ["copy 0", "wait for 1", "copy 1", "wait for 0", "copy 0", "wait for 1"]
