"""Fixtures of tests that run fleets."""

import pytest
from torch import Tensor

from hetis.models import decoder
from hetis_kernels.linear import PackedLinear, linear
from tests.engine import local_fleet

MOST_TOKENS = 2048  # of a step


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the ranks of a test's fleets are; all on one GPU under the marker `gpu`.

    There cuBLAS chooses its kernel by the number of tokens of a step, and with it the order of sums: for laws that hold
    bit for bit, whatever else is in a step, products have one shape.
    """
    monkeypatch.setattr(local_fleet, "default_device", request.param)
    if request.param == "cuda":
        monkeypatch.setattr(decoder, "linear", linear_of_one_shape)
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["depth 0", "depth 1"])
def depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a test's fleets schedule a step while one runs; they do where a test has no such parameter."""
    monkeypatch.setattr(local_fleet, "default_async_scheduling", request.param)
    return bool(request.param)


def linear_of_one_shape(x_TK: Tensor, packed: PackedLinear, out_TN: Tensor | None = None) -> Tensor:
    """`linear` of `MOST_TOKENS` tokens, the last ones zeros."""
    num_tokens = x_TK.shape[0]
    padded = x_TK.new_zeros(MOST_TOKENS, x_TK.shape[1])
    padded[:num_tokens] = x_TK
    whole = linear(padded, packed)
    return whole[:num_tokens] if out_TN is None else out_TN.copy_(whole[:num_tokens])
