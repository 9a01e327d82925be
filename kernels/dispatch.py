"""Selects the implementation that a launcher runs: Triton on CUDA, the C++ extension on the CPU, else plain torch.

Every launcher of this package takes `backend=`: "auto" follows that rule, the other values force one implementation, so
that tests can compare them ("triton" on CPU tensors needs TRITON_INTERPRET=1 before the first import).

Each implementation checks its own arguments and raises ValueError, so that a call is checked once: the operations in
C++, the others by the functions below, whose 10 us per call are paid only where C++ does not do it in less than one.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch

from . import extension

Backend = Literal["auto", "triton", "cpu", "reference"]
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def select(
    name: str,
    backend: Backend,
    device: torch.device,
    reference: Callable[..., None],
    triton: Callable[..., None],
) -> Callable[..., None]:
    """The implementation of `name` for tensors on `device`. The launcher calls it: no frame comes between the two.

    Raises ValueError when "cpu" is asked for and the extension has no such operation, or for an unknown backend.
    """
    if backend == "auto":
        selected = triton if device.type == "cuda" else cpu_op(name) or reference
    elif backend == "reference":
        selected = reference
    elif backend == "triton":
        selected = triton
    elif backend == "cpu":
        found = cpu_op(name)
        if found is None:
            raise ValueError(f"hetis::{name} is not in the C++ extension; reinstall with a C++ compiler at hand")
        selected = found
    else:
        raise ValueError(f"unknown backend {backend!r}; choose auto, triton, cpu or reference")
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return partial(_run_on, device, selected)  # Triton launches on the current device, whatever the tensors say
    return selected


def _run_on(device: torch.device, implementation: Callable[..., None], *arguments: Any) -> None:
    with torch.cuda.device(device):
        implementation(*arguments)


@cache
def cpu_op(name: str) -> Callable[..., None] | None:
    """The C++ operation of that name, or None when the extension is not built or lacks it."""
    if not extension.load():
        return None
    packet = getattr(torch.ops.hetis, name, None)
    return None if packet is None else packet.default


def check_floats(**tensors: torch.Tensor) -> None:
    """ValueError unless all tensors share one float dtype and one device, with contiguous last dimensions."""
    first_name, first = next(iter(tensors.items()))
    if first.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{first_name} has dtype {first.dtype}; use float32, bfloat16 or float16")
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype or tensor.device != first.device:
            wanted = f"{first.dtype} on {first.device} like {first_name}"
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; it must be {wanted}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has last stride {tensor.stride(-1)}; make its last dimension contiguous")


def check_indices(dtype: torch.dtype, device: torch.device, **tensors: torch.Tensor) -> None:
    """ValueError unless all index tensors are contiguous, of that dtype and on that device."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; make it a contiguous {dtype} tensor on {device}"
            )


def check_shape(name: str, tensor: torch.Tensor, *shape: int) -> None:
    """ValueError unless `tensor` has exactly that shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")
