"""Prompts by flash-attn: a stand-in of the package proves what it is asked for and where its answers go."""

import builtins
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hetis_kernels.flash_prefill import flash_prefill, flash_serves, load_flash
from tests.flash_attn_stand_in import FlashAttention, install
from tests.kernels.test_varlen_prefill import Problem

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [1, 5, 33, 16, 70]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What was found stays found in a process: not from one test to the next."""
    load_flash.cache_clear()
    yield
    load_flash.cache_clear()


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashAttention:
    return install(monkeypatch)


@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize(("num_groups", "num_queries", "head_dim"), [(1, 1, 64), (3, 4, 80), (2, 7, 32)])
def test_whole_prompts_equal_the_paged_reference(
    make_lanes: Callable[..., Any],
    flash: FlashAttention,
    num_groups: int,
    num_queries: int,
    head_dim: int,
    window: int,
) -> None:
    problem = Problem(
        make_lanes, [(length, length) for length in LENGTHS], num_groups, num_queries, head_dim, torch.float32
    )
    lanes = problem.lane_CG.tolist()
    for chunk, length in enumerate(LENGTHS):  # the pool of the reference holds what QKV holds
        tokens = slice(int(problem.query_start_C1[chunk]), int(problem.query_start_C1[chunk]) + length)
        for group in range(num_groups):
            page_W = problem.table_BW[lanes[chunk][group]]
            for half in (0, 1):
                new = problem.qkv_TGHD[tokens, group, num_queries + half]
                for position in range(length):
                    problem.lanes.pool_2PSD[half, page_W[position // 16], position % 16] = new[position]
    expected = problem.run(CPU, window, backend="reference")
    out = torch.full_like(expected, torch.nan)
    flash_prefill(problem.qkv_TGHD, problem.query_start_C1, max(LENGTHS), problem.scale, window, out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert flash.prompts_of_calls == [len(LENGTHS)]


def test_only_where_the_package_can_do_it(flash: FlashAttention) -> None:
    half = (torch.float16, torch.bfloat16)
    assert all(flash_serves(CUDA, dtype, head_dim) for dtype in half for head_dim in (64, 80, 256))
    assert not flash_serves(CUDA, torch.float32, 64)
    assert not flash_serves(CUDA, torch.bfloat16, 288)
    assert not flash_serves(CPU, torch.bfloat16, 64)
    assert load_flash() == (flash, "2.8.3")


@pytest.mark.parametrize(
    ("error", "num_lines"),
    [(ModuleNotFoundError("No module named 'flash_attn'"), 0), (ImportError("undefined symbol: _ZN3c10\nmore"), 1)],
)
def test_without_a_package_that_works_nothing_asks_for_it(
    error: ImportError, num_lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "flash_attn":
            raise error
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with caplog.at_level(logging.WARNING):
        assert not flash_serves(CUDA, torch.bfloat16, 64)
        assert not flash_serves(CUDA, torch.bfloat16, 64)
    assert len(caplog.records) == num_lines
    assert all("undefined symbol" in record.getMessage() for record in caplog.records)
