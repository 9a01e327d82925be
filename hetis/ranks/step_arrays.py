"""Copies the index arrays of a step from numpy to the device: on a GPU all of them in one copy."""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetis.comm.streams import StreamEvent

ALIGNMENT = 64  # bytes, of every array: kernels are compiled for aligned ones
FIRST_BYTES = 1 << 16  # of all arrays together; doubled as needed
_NUM_TURNS = 2


class StepArrays(Protocol):
    def put(self, array: NDArray[Any]) -> Tensor:
        """The tensor that has the int32 or int64 `array` on the device after `send`; valid until the next step."""

    def send(self) -> None:
        """Makes what was put since the last call available to work that the current stream gets from now on."""


def step_arrays(device: torch.device) -> StepArrays:
    return DeviceArrays(device) if device.type == "cuda" else HostArrays()


class HostArrays:
    """Arrays of a device that reads numpy's memory. Read-only arrays are copied: torch has no read-only tensors."""

    def put(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array) if array.flags.writeable else array.copy())

    def send(self) -> None:
        pass


class DeviceArrays:
    """Two page-locked host blocks in turn: one is filled while the other, of the step before, may still be copied.

    The device has one block, which the stream overwrites after the work of the step before.
    """

    def __init__(self, device: torch.device, num_bytes: int = FIRST_BYTES) -> None:
        """`num_bytes`: initial size of a block. On a CPU, for tests, memory is not locked."""
        self._device = device
        self._copied = [StreamEvent(device) for _ in range(_NUM_TURNS)]
        self._turn, self._used = 0, 0
        self._allocate(num_bytes)

    def put(self, array: NDArray[Any]) -> Tensor:
        num_bytes = array.nbytes
        if self._used + num_bytes > len(self._device_B):
            self.send()  # of the blocks so far; the one on the device lives as long as tensors refer to it
            self._allocate(2 * max(len(self._device_B), num_bytes))
        begin, end = self._used, self._used + num_bytes
        self._views[self._turn][begin:end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._used = -(-end // ALIGNMENT) * ALIGNMENT
        return self._device_B[begin:end].view(_TORCH_DTYPES[array.dtype]).view(array.shape)

    def send(self) -> None:
        if self._used == 0:
            return
        used = min(self._used, len(self._device_B))
        self._device_B[:used].copy_(self._host_2B[self._turn][:used], non_blocking=True)
        self._copied[self._turn].record()
        self._turn, self._used = (self._turn + 1) % _NUM_TURNS, 0
        self._copied[self._turn].synchronize()

    def _allocate(self, num_bytes: int) -> None:
        is_cuda = self._device.type == "cuda"
        self._host_2B = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(_NUM_TURNS)]
        self._views = [host_B.numpy() for host_B in self._host_2B]
        self._device_B = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)


_TORCH_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}
