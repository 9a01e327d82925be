"""A GPU for tests on a host without one: tensors whose device is "cuda:0" and whose values are in CPU memory.

It finds errors of Python code on a GPU: tensors of two devices in one operation, values read by the host without a
copy, wrong names in `torch.cuda`. Kernels compute with the C++ operations. The order on streams is not checked.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

GPU = torch.device("cuda:0")
META = torch.device("meta")  # their device in torch's view, since "cuda" needs a build with CUDA
MAY_MIX = (
    "copy_",
    "_to_copy",
    "index",
    "index_put_",
    "index_put",
    "_index_put_impl_",
)  # operations that take tensors of two devices, or CPU indices


class OnGpu(Tensor):
    """A tensor on the GPU. All operations are dispatched to `compute`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        with torch.inference_mode(False):  # views of tensors from outside inference mode are made within it
            made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=META,
            )  # fmt: skip
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.inner!r})"


class Names(TorchFunctionMode):
    """Replaces device "cuda" in arguments of torch functions, in one thread."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        if function is torch.tensor:  # not an operation: it makes a tensor on any device
            device = _renamed(kwargs.pop("device", "cpu"))
            return function(*args, **kwargs).to(device)
        return function(*map(_renamed, args), **{name: _renamed(value) for name, value in kwargs.items()})


def _renamed(argument: Any) -> Any:
    if isinstance(argument, str | torch.device) and str(argument).startswith("cuda"):
        return META
    return argument


class Factories(TorchDispatchMode):
    """Dispatches operations that name the GPU but have no tensor on it, in one thread."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of one operation of torch, on the device on which CUDA would have it."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    here = [x for x in tensors if isinstance(x, OnGpu)]
    name = function._schema.name.removeprefix("aten::")
    if any(x.device == META for x in tensors):
        raise NotImplementedError(f"{name}: a tensor without values, such as from a list of indices")
    if here and name not in MAY_MIX:
        strangers = [x for x in tensors if not isinstance(x, OnGpu) and x.dim() > 0]
        if strangers:
            raise RuntimeError(f"{name}: tensors on {[x.device for x in tensors]}")
    device = kwargs.get("device")
    on_gpu = bool(here) if device is None else torch.device(device) == META
    if name in ("copy_", "index_put_", "_index_put_impl_"):
        on_gpu = isinstance(args[0], OnGpu)
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if "pin_memory" in kwargs:
        kwargs = kwargs | {"pin_memory": False}
    wrappers = {id(x.inner): x for x in here}
    plain_args, plain_kwargs = tree_map_only(OnGpu, lambda x: x.inner, (args, kwargs))
    result = function(*plain_args, **plain_kwargs)
    if name == "_to_copy" and any(result is x.inner for x in here):
        result = result.clone()

    def wrapped(x: Tensor) -> Tensor:
        if not on_gpu:
            return x
        return wrappers[id(x)] if id(x) in wrappers else OnGpu(x)

    return tree_map_only(Tensor, wrapped, result)


class Stream:
    """A stream without effect, since work is done when a call returns."""

    def __init__(self, device: Any = None) -> None:
        assert torch.device(device or GPU).type == "cuda"

    def wait_event(self, event: "Event") -> None:
        assert isinstance(event, Event)


class Event:
    """An event with the time of the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._has_time, self._time = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        import time

        assert isinstance(stream, Stream | None)
        self._time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Event") -> float:
        assert self._has_time
        assert later._has_time
        return (later._time - self._time) * 1e3


def _select(name: str, backend: str, device: torch.device, reference: Any, triton: Any) -> Callable[..., None]:
    """Replacement for `hetis_kernels.dispatch.select`."""
    if device.type != "cuda":
        return original_select(name, backend, device, reference, triton)
    selected = original_select(name, backend, torch.device("cpu"), reference, triton)

    def run(*arguments: Any) -> None:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        assert all(isinstance(x, OnGpu) for x in tensors), f"{name}: {[x.device for x in tensors]}"
        selected(*(x.inner if isinstance(x, OnGpu) else x for x in arguments))

    return run


original_select: Callable[..., Callable[..., None]] = import_module("hetis_kernels.dispatch").select
_KERNELS = (
    "gated_activation", "kv_append", "lane_pack", "page_copy", "paged_decode", "rms_norm", "rope", "varlen_prefill",
)  # fmt: skip


def _torch_cuda() -> dict[str, Any]:
    properties = SimpleNamespace(
        name="stand-in", uuid="GPU-0", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
    )
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "Stream": Stream,
        "Event": Event,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (70 << 30, 80 << 30),
        "get_device_name": lambda device=None: "stand-in",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "_sleep": lambda cycles: None,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda address, size, flags: 0, cudaHostUnregister=lambda address: 0
        ),
    }


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives this thread, and threads started in the context, a GPU."""
    for name, value in _torch_cuda().items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in _KERNELS:
        monkeypatch.setattr(import_module(f"hetis_kernels.{name}"), "select", _select)
    run = threading.Thread.run

    def run_with_gpu(thread: threading.Thread) -> None:
        with Names(), Factories():
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", run_with_gpu)
    with Names(), Factories():
        yield
