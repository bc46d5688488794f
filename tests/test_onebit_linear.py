"""onebit's linear on packed codes: the order that its kernels read them in, and the product."""

import copy
import pickle

import pytest
import torch
from close import assert_as_good
from hypothesis import example, given
from hypothesis import strategies as st

from peftkern import _native, onebit
from peftkern.onebit import OneBitWeight, fallback, reference

if not _native.serves("onebit_linear", "cpu"):
    pytest.skip("the library is not built", allow_module_level=True)

LINEAR, LAY_OUT = torch.ops.peftkern.onebit_linear, torch.ops.peftkern.onebit_lay_out
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = st.sampled_from(reference.BITS)
PACKED = ("onebit_linear", "onebit_lay_out", "onebit_decode")  # what few rows take on a GPU


def packed_codes(rows, width, bits):
    return reference.pack(torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8), bits)


def in_order(laid_out, rows, width, bits):
    """The canonical bytes, by the description in csrc/onebit/linear.h."""
    size, words = (width * bits + 7) // 8, -(-width * bits // 32)
    tiles = -(-rows // 16)
    if not tiles * words:
        return torch.empty(rows, size, dtype=torch.uint8)
    word = laid_out.view(-1, 4).long() @ torch.tensor([1, 2**8, 2**16, 2**24])
    blocks = word.split(tiles * 16 * 16)
    lanes = torch.cat([b.view(tiles, -1, 16).transpose(1, 2) for b in blocks], 2)
    assert lanes.shape == (tiles, 16, words)
    nibbles = lanes.reshape(tiles * 16, words, 1) >> torch.arange(0, 32, 4) & 15
    nibbles = torch.where(nibbles > 7, nibbles ^ 7, nibbles).view(tiles * 16, 4 * words, 2)
    whole = (nibbles[..., 0] + 16 * nibbles[..., 1]).to(torch.uint8)
    assert not whole[rows:].any() and not whole[:, size:].any()
    return whole[:rows, :size]


@given(rows=st.integers(0, 50), width=st.integers(0, 1300), bits=BITS)
@example(rows=16, width=512, bits=1)
@example(rows=17, width=513, bits=1)
def test_laid_out_codes_can_be_put_back_in_order(isa, rows, width, bits):
    packed = packed_codes(rows, width, bits)
    laid_out = LAY_OUT(packed, bits, width)
    assert len(laid_out) == fallback.laid_out_bytes(packed, bits, width)
    assert torch.equal(in_order(laid_out, rows, width, bits), packed)


@pytest.mark.parametrize("bits", reference.BITS)
def test_each_code_has_a_place_of_its_own(bits):
    rows, width = 18, 37
    empty = LAY_OUT(packed_codes(rows, width, bits) * 0, bits, width)
    assert not empty.any()
    seen = set()
    for place in range(rows * width):
        for code in range(1, 2**bits):
            codes = torch.zeros(rows * width, dtype=torch.uint8)
            codes[place] = code
            packed = reference.pack(codes.view(rows, width), bits)
            seen.add(bytes(LAY_OUT(packed, bits, width).tolist()))
    assert len(seen) == rows * width * (2**bits - 1)


def check(x, packed, statistics, bits, bias=None):
    width, rows = x.shape[-1], len(packed)
    y = LINEAR(x, LAY_OUT(packed, bits, width), statistics, bits, rows, bias)
    dense = reference.dequantize(packed, statistics.double(), bits, width)

    def plain(x, weight, bias):
        y = x @ weight.to(x.dtype).t()
        return y if bias is None else y + bias.to(x.dtype)

    assert_as_good(y, plain, x, dense, bias)
    return y


@pytest.mark.ops(*PACKED)
@given(
    rows=st.integers(0, 150),
    width=st.integers(0, 1100),
    inputs=st.integers(0, 30),
    bits=BITS,
    dtype=st.sampled_from(FLOATS),
    bias=st.sampled_from([None, *FLOATS]),
)
@example(rows=130, width=1025, inputs=7, bits=1, dtype=torch.float32, bias=None)
@example(rows=33, width=1025, inputs=60, bits=1, dtype=torch.bfloat16, bias=torch.float32)
@example(rows=33, width=700, inputs=130, bits=1, dtype=torch.float32, bias=torch.float32)
@example(rows=33, width=700, inputs=100, bits=2, dtype=torch.float32, bias=torch.bfloat16)
@example(rows=33, width=700, inputs=25, bits=2, dtype=torch.bfloat16, bias=torch.float16)
@example(rows=33, width=300, inputs=25, bits=4, dtype=torch.float16, bias=torch.float64)
@example(rows=3, width=0, inputs=200, bits=4, dtype=torch.float32, bias=torch.float32)
def test_linear_is_the_reference(isa, rows, width, inputs, bits, dtype, bias):
    x = torch.randn(inputs, width).to(dtype)
    bias = None if bias is None else torch.randn(rows).to(bias)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    statistics = torch.tensor([[0.02, 0.8]], dtype=single)
    check(x, packed_codes(rows, width, bits), statistics, bits, bias)


@pytest.mark.ops(*PACKED)
@pytest.mark.parametrize("mean", [0.0, 0.65, 1000.0])
@pytest.mark.parametrize("width", [1, 7, 8, 31, 32, 33, 768])
def test_any_mean_beside_the_std(isa, width, mean):
    """Off by a few roundings of the sum's parts, which may cancel."""
    for rows in (1, 3, 32, 100):
        packed, statistics = packed_codes(rows, width, 1), torch.tensor([[mean, 1.0]])
        x = torch.randn(5, width)
        y = LINEAR(x, LAY_OUT(packed, 1, width), statistics, 1, rows, None)
        truth = x.double() @ reference.dequantize(packed, statistics.double(), 1, width).t()
        parts = (abs(mean) + 1) * x.abs().sum(1, keepdim=True)
        assert ((y - truth).abs() <= 5e-7 * parts).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_panels_of_a_wide_weight_cover_its_rows(dtype):
    """Of 64 rows each, two of them and a part."""
    x = torch.randn(130, 40000).to(dtype)
    check(x, packed_codes(150, 40000, 4), torch.tensor([[0.0, 1.0]]), 4)


@pytest.mark.parametrize("bits", reference.BITS)
def test_neither_threads_nor_other_rows_change_a_bit(isa, bits):
    rows, width = 700, 1100
    packed, statistics = packed_codes(rows, width, bits), torch.tensor([[0.02, 0.8]])
    laid_out = LAY_OUT(packed, bits, width)
    x = torch.randn(4, width)
    y = LINEAR(x, laid_out, statistics, bits, rows, None)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(LINEAR(x, laid_out, statistics, bits, rows, None), y)
            for i in range(4):
                alone = LINEAR(x[i], laid_out, statistics, bits, rows, None)
                assert torch.equal(alone, y[i])
    finally:
        torch.set_num_threads(threads)


def weight_of(rows, width, bits, dtype=torch.float32):
    return onebit.quantize(torch.randn(rows, width, dtype=dtype), bits)


@pytest.mark.ops(*PACKED)
@pytest.mark.parametrize("bits", reference.BITS)
def test_a_packed_weight_is_the_dense_one(isa, bits):
    weight, bias = weight_of(70, 300, bits), torch.randn(70)
    for shape in ((300,), (2, 3, 300), (0, 300)):
        x = torch.randn(shape)
        y = onebit.linear(x, weight, bias)
        wanted = torch.nn.functional.linear(x, weight.dequantize(), bias)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", reference.BITS)
def test_the_gradient_of_x_and_bias_is_right(isa, bits):
    weight = weight_of(6, 9, bits, torch.float64)
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: onebit.linear(x, weight, b), (x, bias))


@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("inputs", [2, 100])
def test_the_ops_are_well_registered(bits, inputs):
    packed, statistics = packed_codes(20, 37, bits), torch.tensor([[0.02, 0.8]])
    torch.library.opcheck(LAY_OUT, (packed, bits, 37))
    laid_out = LAY_OUT(packed, bits, 37)
    for bias in (None, torch.randn(20)):
        torch.library.opcheck(
            LINEAR, (torch.randn(inputs, 37), laid_out, statistics, bits, 20, bias)
        )


def test_it_compiles_whole():
    weight, bias = weight_of(20, 37, 1), torch.randn(20, requires_grad=True)
    x = torch.randn(3, 37, requires_grad=True)
    compiled = torch.compile(onebit.linear, fullgraph=True, backend="aot_eager")
    y = compiled(x, weight, bias)
    grads = torch.autograd.grad(y.square().sum(), (x, bias))
    wanted = onebit.linear(x, weight, bias)
    assert torch.equal(y, wanted)
    for found, right in zip(
        grads, torch.autograd.grad(wanted.square().sum(), (x, bias)), strict=True
    ):
        torch.testing.assert_close(found, right)


@pytest.mark.ops(*PACKED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_stays_in_its_row_of_x(isa, dtype):
    packed, statistics = packed_codes(40, 600, 1), torch.tensor([[0.02, 0.8]])
    for inputs, special in ((3, torch.inf), (200, torch.nan)):
        x = torch.randn(inputs, 600).to(dtype)
        x[1, 300] = special
        y = LINEAR(x, LAY_OUT(packed, 1, 600), statistics, 1, 40, None)
        assert not y[1].isfinite().any()
        assert y[[0, *range(2, inputs)]].isfinite().all()


@pytest.mark.ops(*PACKED)
@pytest.mark.parametrize("statistics", [[torch.nan, 1.0], [0.0, torch.nan], [torch.inf, 1.0]])
def test_statistics_that_are_no_numbers_spoil_everything(isa, statistics):
    packed = packed_codes(40, 600, 1)
    y = LINEAR(torch.rand(2, 600), LAY_OUT(packed, 1, 600), torch.tensor([statistics]), 1, 40, None)
    assert not y.isfinite().any()


@pytest.mark.ops(*PACKED)
def test_without_a_std_every_weight_is_the_mean(isa):
    packed = packed_codes(40, 600, 1)
    x = torch.randint(-8, 8, (2, 600)).float()
    y = LINEAR(x, LAY_OUT(packed, 1, 600), torch.tensor([[0.5, 0.0]]), 1, 40, None)
    assert torch.equal(y, 0.5 * x.sum(1, keepdim=True).expand(2, 40))


def test_memory_that_is_not_there_is_not_read():
    packed, statistics = packed_codes(20, 37, 1), torch.tensor([[0.02, 0.8]])
    laid_out, x = LAY_OUT(packed, 1, 37), torch.randn(2, 37)
    for wrong in (
        (x, laid_out[:-1], statistics, 1, 20, None),
        (x, laid_out, statistics[:, :1].contiguous(), 1, 20, None),
        (x, laid_out, statistics.half(), 1, 20, None),
        (x, laid_out, statistics, 3, 20, None),
        (x, laid_out, statistics, 1, 200, None),
        (x, laid_out, statistics, 1, 20, torch.randn(19)),
        (torch.randn(2, 90), laid_out, statistics, 1, 20, None),
    ):
        with pytest.raises(RuntimeError, match="must|wrong dtype"):
            LINEAR(*wrong)
    with pytest.raises(RuntimeError, match="packed must have"):
        LAY_OUT(packed, 1, 50)


def test_a_weight_keeps_its_order_of_codes():
    weight = weight_of(20, 37, 1)
    assert isinstance(weight, OneBitWeight)
    assert weight.laid_out() is weight.laid_out()


def test_a_copy_of_a_weight_orders_its_codes_anew():
    """It may have been read to another device, whose kernels have them in another order."""
    weight, x = weight_of(20, 37, 1), torch.randn(3, 37)
    y = onebit.linear(x, weight)
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert weight._laid_out and not twin._laid_out
        assert torch.equal(onebit.linear(x, twin), y)
