"""Fixtures of the kernel tests.

Triton kernels run twice: on the CPU under Triton's interpreter and, under the marker `gpu`, on CUDA, where pytest must
be started with TRITON_INTERPRET=0. Either has to be chosen before triton is first imported.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton

INTERPRETED = not isinstance(triton.language.zeros, triton.JITFunction)  # what triton was imported as

# The interpreter cuts float32 to bfloat16 where a GPU rounds: one unit in the last place is the least it can miss by.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def pytest_configure(config: pytest.Config) -> None:
    """numpy, on which the interpreter computes, warns where a GPU returns the infinity that the kernels mean."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the Triton kernels of a test run."""
    if (request.param == "interpreted") != INTERPRETED:
        wanted = int(not INTERPRETED)
        pytest.fail(f"set TRITON_INTERPRET={wanted} before pytest starts: triton was imported with {int(INTERPRETED)}")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """For torch.testing.assert_close."""
    return {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}


@dataclass(frozen=True)
class Lanes:
    """Cached lanes: dense K and V [length, D] of each, and the same values in a pool behind a permuted page table."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    pool_2PSD: torch.Tensor
    page_table_BW: torch.Tensor

    def to(self, device: torch.device) -> "Lanes":
        return Lanes(self.k, self.v, self.pool_2PSD.to(device), self.page_table_BW.to(device))


@pytest.fixture(scope="session")
def make_lanes() -> Callable[..., Lanes]:
    """make_lanes(lengths, head_dim, dtype, page_size=16): every page, offset and entry not in use is poisoned."""

    def make(lengths: list[int], head_dim: int, dtype: torch.dtype, page_size: int = 16) -> Lanes:
        num_pages = [-(-length // page_size) for length in lengths]
        free = torch.randperm(sum(num_pages) + 3).int()
        poison_page, free = free[-1], free[:-1]
        pool = torch.full((2, sum(num_pages) + 3, page_size, head_dim), torch.nan, dtype=dtype)
        pool[:, ::2] = torch.inf
        table = torch.full((len(lengths), max(num_pages) + 2), int(poison_page), dtype=torch.int32)
        keys, values = [], []
        for lane, length in enumerate(lengths):
            table[lane, : num_pages[lane]], free = free[: num_pages[lane]], free[num_pages[lane] :]
            k, v = torch.randn(2, length, head_dim).to(dtype)
            token = torch.arange(length)
            pool[0, table[lane, token // page_size].long(), token % page_size] = k
            pool[1, table[lane, token // page_size].long(), token % page_size] = v
            keys.append(k)
            values.append(v)
        return Lanes(keys, values, pool, table)

    return make


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter() -> None:
    """Two faults of Triton's interpreter, mended for the tests."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    multiply, patch_tensor = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        # it multiplies the bit patterns of bfloat16 matrices as integers; hand it their values
        a, b = (builder.cast_impl(x, triton.language.float32) if x.dtype.scalar.is_bf16() else x for x in (a, b))
        return multiply(builder, a, b, *rest)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        # up to 3.6 it takes int() of an array of one value, which numpy refuses from 2.4 on
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter.InterpreterBuilder.create_dot = create_dot
    if triton.__version__.startswith("3.6."):
        interpreter._patch_lang_tensor = patch_lang_tensor
