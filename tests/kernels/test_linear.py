"""Linear layers: exact to the dtype, the same for a token in any company, on every instruction set of this machine."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from hetis_kernels.linear import empty_weight, linear, pack_linear, weight_rows


@pytest.fixture(params=["avx2", "avx512", "avx512_bf16"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Limits the kernels to one instruction set that this machine has."""
    if torch.ops.hetis.limit_dense_isa(request.param) != request.param:
        pytest.skip(f"no {request.param} here")
    yield request.param
    torch.ops.hetis.limit_dense_isa("avx512_bf16")


def run_kernel(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """The kernel alone, into the left part of a larger result of which the rest must stay as it was."""
    num_tokens, num_outputs = x_TK.shape[0], weight_NK.shape[0]
    out = torch.full((num_tokens, num_outputs + 3), torch.nan, dtype=x_TK.dtype)
    torch.ops.hetis.linear(x_TK, pack_linear(weight_NK).weight, bias_N, out[:, :num_outputs])
    assert out[:, num_outputs:].isnan().all()
    return out[:, :num_outputs]


def assert_rounded_sum(result: torch.Tensor, x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor) -> None:
    """One rounding to the dtype plus float32 sums: |error| <= eps |y| / 2 + K eps32 sum |x w|, counted generously."""
    x, weight, bias = x_TK.double(), weight_NK.double(), bias_N.double()
    expected = x @ weight.T + bias
    magnitude = x.abs() @ weight.abs().T + bias.abs()
    eps = 0.0 if x_TK.dtype == torch.float32 else torch.finfo(x_TK.dtype).eps
    bound = 0.51 * eps * expected.abs() + 1e-6 * magnitude + 1e-7
    assert bool(((result.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("num_inputs", [1, 8, 31, 33, 264])
@pytest.mark.parametrize("num_outputs", [1, 5, 8, 31, 33, 80])
def test_it_is_the_product_rounded_once(
    instructions: str, dtype: torch.dtype, num_outputs: int, num_inputs: int
) -> None:
    weight = torch.randn(num_outputs, num_inputs + 5).to(dtype)[:, :num_inputs]
    bias = torch.randn(num_outputs).to(dtype)
    for num_tokens in (1, 4, 5, 9, 16, 17, 37):
        x = torch.randn(num_tokens, num_inputs + 1).to(dtype)[:, 1:]
        assert_rounded_sum(run_kernel(x, weight, bias), x, weight, bias)


def test_many_tokens_and_many_rows(instructions: str, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(523, 72).to(dtype), torch.randn(4099, 72).to(dtype), torch.randn(4099).to(dtype)
    assert_rounded_sum(run_kernel(x, weight, bias), x, weight, bias)


def test_a_token_does_not_see_the_tokens_beside_it(instructions: str, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(40, 300).to(dtype), torch.randn(130, 300).to(dtype), torch.randn(130).to(dtype)
    whole = run_kernel(x, weight, bias)
    for first, last in ((0, 1), (3, 5), (8, 16), (17, 40), (39, 40)):
        assert torch.equal(run_kernel(x[first:last], weight, bias), whole[first:last])
    x[7] = torch.nan
    x[8] = torch.inf
    others = [t for t in range(40) if t not in (7, 8)]
    assert torch.equal(run_kernel(x, weight, bias)[others], whole[others])


@pytest.mark.parametrize("num_tokens", [9, 200])  # of 200, one or two threads divide the tokens, three the outputs
def test_an_output_does_not_depend_on_the_rank_or_thread_that_computes_it(
    instructions: str, dtype: torch.dtype, num_tokens: int
) -> None:
    x, weight = torch.randn(num_tokens, 256).to(dtype), torch.randn(3000, 256).to(dtype)
    whole = run_kernel(x, weight)
    for first, last in ((0, 1), (1, 1500), (1500, 3000), (2990, 2995)):
        assert torch.equal(run_kernel(x, weight[first:last]), whole[:, first:last])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run_kernel(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


def test_not_a_number_and_overflow_stay_visible(dtype: torch.dtype) -> None:
    x, weight = torch.ones(2, 40).to(dtype), torch.ones(8, 40).to(dtype)
    x[0, 39], weight[3] = torch.nan, torch.finfo(dtype).max
    result = run_kernel(x, weight)
    assert result[0].isnan().all()
    assert result[1].isinf().tolist() == [n == 3 for n in range(8)]


def test_without_tokens_or_with_a_bias_alone(instructions: str, dtype: torch.dtype) -> None:
    bias = torch.randn(9).to(dtype)
    assert run_kernel(torch.zeros(0, 16, dtype=dtype), torch.zeros(9, 16, dtype=dtype)).shape == (0, 9)
    assert torch.equal(run_kernel(torch.zeros(2, 16, dtype=dtype), torch.zeros(9, 16, dtype=dtype), bias)[1], bias)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 70])
def test_a_share_of_nothing(dtype: torch.dtype, plain: bool, num_tokens: int) -> None:
    """No outputs; and without inputs the bias, or zeros where there is none, whatever was in the result before."""
    x, bias = torch.randn(num_tokens, 16).to(dtype), torch.randn(9).to(dtype)
    into, out_of = (
        pack_linear(x.new_empty(0, 16), plain=plain),
        (pack_linear(x.new_empty(9, 0), plain=plain), pack_linear(x.new_empty(9, 0), bias, plain=plain)),
    )
    nothing = linear(x, into, x.new_empty(num_tokens, 0))
    assert nothing.shape == (num_tokens, 0)
    for packed, expected in zip(out_of, (torch.zeros(9, dtype=dtype), bias), strict=True):
        out = torch.full((num_tokens, 9), torch.nan, dtype=dtype)
        assert linear(nothing, packed, out) is out
        assert torch.equal(out, expected.expand(num_tokens, 9))
        assert torch.equal(linear(nothing, packed), out)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_layer_is_the_one_of_torch(dtype: torch.dtype, plain: bool, with_bias: bool) -> None:
    x, weight = torch.randn(6, 64).to(dtype), torch.randn(50, 64).to(dtype)
    packed = pack_linear(weight, torch.randn(50).to(dtype) if with_bias else None, plain=plain)
    assert (packed.weight.data_ptr() == weight.data_ptr()) == plain
    tolerance = 4 * torch.finfo(dtype).eps
    out = torch.empty(6, 50, dtype=dtype)
    expected = functional.linear(x, weight, packed.bias)
    torch.testing.assert_close(linear(x, packed), expected, rtol=tolerance, atol=8 * tolerance)
    assert linear(x, packed, out) is out
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=8 * tolerance)
    assert linear(x[:0], packed).shape == (0, 50)


def test_without_a_kernel_torch_computes() -> None:
    weight, x = torch.randn(32, 16), torch.randn(4, 16)
    torch.ops.hetis.limit_dense_isa("portable")
    try:
        packed = pack_linear(weight, in_place=True)
        assert packed.weight is weight
        assert empty_weight(5, 3, torch.float32, weight.device).is_contiguous()
    finally:
        torch.ops.hetis.limit_dense_isa("avx512_bf16")
    assert torch.equal(linear(x, packed), functional.linear(x, weight))


@pytest.mark.parametrize("num_inputs", [0, 1, 7, 64])
@pytest.mark.parametrize("num_outputs", [0, 1, 32, 70])
def test_packing_in_place_is_packing(dtype: torch.dtype, num_outputs: int, num_inputs: int) -> None:
    weight = torch.randn(num_outputs, num_inputs).to(dtype)
    memory = empty_weight(num_outputs, num_inputs, dtype, weight.device)
    memory.copy_(weight)
    packed, copied = pack_linear(memory, in_place=True), pack_linear(weight)
    assert packed.weight.data_ptr() == memory.data_ptr()
    assert torch.equal(packed.weight, copied.weight)
    assert packed.weight.count_nonzero() == weight.count_nonzero()  # the padding is zero


@pytest.mark.parametrize("num_inputs", [1, 7, 64])
def test_rows_are_read_from_packed_weights(dtype: torch.dtype, num_inputs: int) -> None:
    weight = torch.randn(75, num_inputs).to(dtype)
    row = torch.tensor([74, 0, 31, 32, 31, *range(75)])
    for packed in (pack_linear(weight), pack_linear(weight, plain=True)):
        out = torch.full((len(row), num_inputs + 2), torch.nan, dtype=dtype)[:, :num_inputs]
        if not packed.is_packed:
            out = out.contiguous()
        weight_rows(packed, row, out)
        assert torch.equal(out, weight[row])
        weight_rows(packed, row[:0], out[:0])
    with pytest.raises(IndexError, match="75"):
        weight_rows(pack_linear(weight), torch.tensor([75]), torch.empty(1, num_inputs, dtype=dtype))


@pytest.mark.parametrize("with_bias", [False, True])
def test_what_matrix_units_compute_is_the_same_layer(dtype: torch.dtype, with_bias: bool) -> None:
    """The path for many tokens on processors with AMX, which all processors have."""
    x, weight, bias = torch.randn(40, 65).to(dtype), torch.randn(50, 65).to(dtype), torch.randn(50).to(dtype)
    out = torch.empty(40, 50, dtype=dtype)
    torch.ops.hetis.linear_by_onednn(x, pack_linear(weight).weight, bias if with_bias else None, out)
    tolerance = 4 * torch.finfo(dtype).eps
    expected = functional.linear(x, weight, bias if with_bias else None)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=8 * tolerance)


def test_arguments_are_checked() -> None:
    weight = torch.zeros(8, 4)
    with pytest.raises(ValueError, match="give a matrix"):
        pack_linear(weight[0])
    with pytest.raises(ValueError, match="one value for each row"):
        pack_linear(weight, torch.zeros(9))
    with pytest.raises(ValueError, match="differ in dtype"):
        pack_linear(weight, torch.zeros(8).bfloat16())
    with pytest.raises(ValueError, match=r"torch\.int8"):
        pack_linear(weight.to(torch.int8))
    with pytest.raises(ValueError, match="last stride"):
        pack_linear(weight.t())
    with pytest.raises(ValueError, match="make it by empty_weight"):
        pack_linear(weight, in_place=True)


def test_the_kernel_checks_what_it_would_read() -> None:
    x, weight, out = torch.zeros(2, 4), pack_linear(torch.zeros(8, 4)).weight, torch.zeros(2, 8)
    op = torch.ops.hetis.linear
    for other in (torch.zeros(8, 4), weight[:, :3], torch.cat((weight, weight)), weight.half().transpose(1, 2)):
        with pytest.raises(ValueError, match=r"must be \[T, K\], packed .* and \[T, N\]"):
            op(x, other, None, out)
    with pytest.raises(ValueError, match="one dtype"):
        op(x.half(), weight, None, out)
    with pytest.raises(ValueError, match="the bias must be"):
        op(x, weight, torch.zeros(7), out)
    with pytest.raises(ValueError, match="unknown instruction set neon"):
        torch.ops.hetis.limit_dense_isa("neon")


def test_huge_pages_change_no_value() -> None:
    whole = torch.arange(3 << 20, dtype=torch.float32).view(1024, 3072)
    expected = whole.clone()
    for tensor in (whole, whole[:, 100:2000], whole[5:9], whole[:0], torch.zeros(())):
        torch.ops.hetis.advise_huge_pages(tensor, True)
    assert torch.equal(whole, expected)
