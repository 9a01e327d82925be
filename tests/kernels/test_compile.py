"""Every Triton kernel compiled for real for four generations of cards, without one: no spills, bounded shared memory.

The launchers are called on tensors without data, and a recorder in the place of each kernel keeps what they would
launch. All of it happens in one child process, because this one imports triton as an interpreter.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.against_reference import KERNELS

ROOT = Path(__file__).parents[2]
# the most shared memory of one program, in KiB, by compute capability (CUDA C++ programming guide)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
empty = partial(torch.empty, device="meta")
int32 = partial(torch.empty, device="meta", dtype=torch.int32)


def launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launchers, with the name of the case: shapes of real models, and a pool beyond 2^31 values."""
    import hetis_kernels as hk

    launch = partial(partial, backend="triton")
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shapes = [(4, d, dtype) for dtype in (bf16, fp32) for d in (64, 80, 128)]
    for m, d, dtype in [*shapes, (1, 128, fp16), (8, 80, bf16), (64, 128, bf16), (4, 256, bf16)]:
        name = f"{TYPES[dtype]} M={m} D={d}"
        pool, table = empty(2, 1 << 21, 16, d, dtype=dtype), int32(512, 2048)
        q, out = empty(99, m + 2, d, dtype=dtype)[:, :m], empty(99, m, d, dtype=dtype)
        lanes = (int32(99), int32(99), int32(99))
        yield f"paged_decode {name}", launch(hk.paged_decode, q, pool, table, *lanes, 0.1, 0, out)
        q, out = empty(500, 8, m + 2, d, dtype=dtype)[:, :, :m], empty(500, 8, m, d, dtype=dtype)
        chunks = (int32(6), int32(5, 8), int32(5))
        yield f"paged_prefill {name}", launch(hk.paged_prefill, q, pool, table, *chunks, 0.1, 0, out)
    for d, dtype in ((80, bf16), (128, fp32)):
        name = f"{TYPES[dtype]} D={d}"
        vectors, index = empty(99, 6, d, dtype=dtype), int32(64)
        pool, buffer = empty(32, 2, 1 << 16, 16, d, dtype=dtype), empty(64, 32, 2, 16, d, dtype=dtype)
        yield f"kv_append {name}", launch(hk.kv_append, vectors[:, 4], vectors[:, 5], pool[3], index, index.long())
        yield f"page_gather {name}", launch(hk.page_gather, pool, index, buffer)
    qkv, weight, angles = empty(64, 8, 6, 128, dtype=bf16), empty(128, dtype=bf16), empty(4096, 128)
    position, packed = empty(64, dtype=torch.int64), empty(64, 6 * 128, dtype=bf16)
    yield "lane_pack bf16", launch(hk.lane_pack, empty(512, 768, dtype=bf16), int32(64), packed)
    yield "lane_unpack bf16", launch(hk.lane_unpack, packed, int32(64), empty(512, 768, dtype=bf16))
    yield "page_scatter fp32", launch(hk.page_scatter, buffer, int32(64), pool)
    yield "norm and rope bf16", launch(hk.qk_norm_rope, qkv, 4, weight, weight, 1e-6, angles, position)
    yield "rope fp32 D=80", launch(hk.qk_norm_rope, empty(64, 8, 6, 80), 4, None, None, 1e-6, empty(4096, 80), position)
    x, weight = empty(64, 1024, dtype=bf16), empty(1024, dtype=bf16)
    yield "rms_norm bf16 H=1024", launch(hk.rms_norm, x, weight, 1e-6, x)
    for hidden in (1024, 8192):
        x, weight = empty(64, hidden, dtype=bf16), empty(hidden, dtype=bf16)
        yield f"add_rms_norm bf16 H={hidden}", launch(hk.add_rms_norm, x, x, weight, 1e-6, x)
    for activation in ("silu", "gelu"):
        gate_up = empty(64, 2 * 11008, dtype=bf16)
        yield f"{activation} bf16", launch(hk.gated_activation, gate_up, activation, empty(64, 11008, dtype=bf16))


class Recorder:
    """Stands for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: self.launches.append((arguments, keywords))


def compile_launch(
    kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], capability: int
) -> dict[str, int]:
    """Registers, stack bytes and shared memory of the kernel, specialised as a launch would specialise it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    options = {name: values.pop(name) for name in keywords if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if specialise and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = resource_usage(compiled.asm["cubin"])
    return usage | {"shared": compiled.metadata.shared, "async_copies": compiled.asm["ptx"].count("cp.async.cg")}


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What the driver would reserve for the program, read back from the compiled file."""
    import triton

    path = Path(os.environ["HETIS_COMPILE_DIRECTORY"]) / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}  # type: ignore[index]


def main() -> None:
    """Prints a JSON list of [case, kernel, compute capability, figures]."""
    warnings.simplefilter("ignore")
    rows = []
    recorders = []
    for module_name, kernel_names in KERNELS.items():
        module = import_module(f"hetis_kernels.{module_name}")
        for name in kernel_names:
            recorders.append(Recorder(getattr(module, name)))
            setattr(module, name, recorders[-1])
    for case, launch in launches():
        launch()
        for recorder in recorders:
            for arguments, keywords in recorder.launches:
                # speed and bits must not follow a default that differs between versions of Triton
                assert keywords["enable_fp_fusion"] is True, case
                for capability in SHARED_KIB:
                    figures = compile_launch(recorder.kernel, arguments, keywords, capability)
                    rows.append((case, recorder.kernel.__name__, capability, figures))
            recorder.launches.clear()
    print(json.dumps(rows))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, int, dict[str, int]]]:
    directory = tmp_path_factory.mktemp("compile")
    environment = os.environ | {"TRITON_INTERPRET": "0", "HETIS_COMPILE_DIRECTORY": str(directory)}
    command = [sys.executable, "-m", "tests.kernels.test_compile"]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_every_kernel_was_compiled(compiled: list[tuple[str, str, int, dict[str, int]]]) -> None:
    assert {kernel for _, kernel, _, _ in compiled} == {name for names in KERNELS.values() for name in names}


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_nothing_spills_and_shared_memory_suffices(
    compiled: list[tuple[str, str, int, dict[str, int]]], capability: int
) -> None:
    wrong = [
        (case, figures)
        for case, _, compiled_for, figures in compiled
        if compiled_for == capability
        and (figures["stack"] or figures["local"] or figures["shared"] > 1024 * SHARED_KIB[capability])
    ]
    assert not wrong


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_attention_reads_ahead(compiled: list[tuple[str, str, int, dict[str, int]]], capability: int) -> None:
    """Keys and values are copied to shared memory asynchronously; without that, decoding waits for every block."""
    attention = ("_paged_decode_kernel", "_paged_prefill_kernel")
    rows = [row for row in compiled if row[1] in attention and row[2] == capability]
    assert rows
    assert all(figures["async_copies"] > 0 for _, _, _, figures in rows)


if __name__ == "__main__":
    main()
