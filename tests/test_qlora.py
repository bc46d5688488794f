"""Is every kernel of qlora the reference, on every instruction set that this machine has?"""

import itertools
from dataclasses import replace

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from samples import FORMATS, quantized, sample

from peftkern import qlora
from peftkern.qlora import fallback, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = st.integers(1, 70)
ANY_FORMAT = st.sampled_from(FORMATS)


@pytest.mark.ops("qlora_quantize")
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    block_size=st.sampled_from([16, 32, 64, 256, 4096]),
    dtype=st.sampled_from(DTYPES),
    format=ANY_FORMAT,
)
def test_quantize_is_the_reference(isa, shape, block_size, dtype, format):
    w = torch.randn(shape).to(dtype)
    found = quantized(w, format, block_size)
    tables, bits = found.format.tables(w.device), found.format.bits
    packed, absmax = fallback.quantize(w, tables, found.block_size or 0, bits)
    assert torch.equal(found.packed, packed) and torch.equal(found.absmax, absmax)


@pytest.mark.ops("qlora_dequantize")
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    block_size=st.sampled_from([16, 32, 64, 256, 4096]),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    format=ANY_FORMAT,
)
def test_dequantize_is_the_reference(isa, shape, block_size, nested, dtype, format):
    weight = quantized(torch.randn(shape), format, block_size, nested)
    truth = fallback.dense(weight.buffers, weight.layout).view(shape)
    assert torch.equal(qlora.dequantize(weight, dtype), truth.to(dtype))


@pytest.mark.ops("qlora_decode")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_survives_the_way_to_float_and_back(isa, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    bias, zero = bits.view(dtype), qlora.quantize(torch.zeros(2**16, 32), block_size=32)
    y = qlora.linear(torch.zeros(1, 32, dtype=dtype), zero, bias)[0]
    same = y == bias  # so a NaN is not
    assert torch.equal(~same, bias.isnan()) and torch.equal(y.isnan(), bias.isnan())


@pytest.mark.ops("qlora_decode")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_are_rounded_to_16_bits_as_torch_rounds(isa, dtype):
    bits = torch.randint(-(2**31), 2**31, (2**16,)).to(torch.int32)
    edges = torch.tensor([65504, 65519.99, 65520, 2**-24, 2**-25, 3 * 2**-26, 3.4e38, 2**-133])
    values = torch.cat([bits.view(torch.float32), edges, -edges, torch.arange(2**12) / 2**10])
    weight = qlora.quantize(torch.zeros(len(values), 32), block_size=32)
    y = qlora.linear(torch.zeros(1, 32, dtype=dtype), weight, values)[0]
    wanted = values.to(dtype)
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y[~y.isnan()], wanted[~wanted.isnan()])


@pytest.mark.ops("qlora_linear", "qlora_decode")
@given(
    rows=SIZES,
    columns=st.one_of(SIZES, st.sampled_from([64, 128, 192, 576])),
    inputs=st.integers(0, 40),
    rank=st.integers(1, 20),
    block_size=st.sampled_from([16, 32, 64, 128]),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    low_rank=st.booleans(),
    format=ANY_FORMAT,
)
def test_linear_is_the_reference(
    isa, rows, columns, inputs, rank, block_size, nested, dtype, bias, low_rank, format
):
    x, weight, b, lora_a, lora_b = sample(
        rows, columns, inputs, rank, dtype, block_size, nested, format=format
    )
    rest = [b if bias else None, *([lora_a, lora_b] if low_rank else [None, None]), 0.5]
    y = qlora.linear(x, weight, *rest)
    assert_as_good(y, reference.linear, x, weight.dequantize(torch.float32), *rest)


@given(
    rows=SIZES,
    columns=SIZES,
    inputs=st.integers(0, 40),
    p=st.sampled_from([0.0, 0.25, 1.0]),
    low_rank=st.booleans(),
)
def test_a_dense_base_takes_the_same_path(isa, rows, columns, inputs, p, low_rank):
    x, weight, bias, *lora = sample(rows, columns, inputs, 4)
    rest = [bias, *(lora if low_rank else [None, None]), 2.0, p]
    dense, seed = weight.dequantize(), torch.tensor([7])
    assert_as_good(qlora.linear(x, dense, *rest, seed), reference.linear, x, dense, *rest, seed)


@given(
    rows=SIZES,
    columns=SIZES,
    inputs=st.integers(0, 40),
    experts=st.integers(1, 4),
    mixed=st.booleans(),
    cuts=st.randoms(),
    format=ANY_FORMAT,
)
def test_expert_linear_is_the_reference(isa, rows, columns, inputs, experts, mixed, cuts, format):
    x, weight, bias, lora_a, lora_b = sample(
        rows, columns, inputs, 4, block_size=16, experts=experts, format=format
    )
    inner = sorted(cuts.randint(0, inputs) for _ in range(experts - 1))
    offsets = torch.tensor([0, *inner, inputs])
    adapter = torch.randint(-1, experts, (inputs,), dtype=torch.int32) if mixed else None
    rest = [bias, lora_a, lora_b, 0.5, 0.25, torch.tensor([3]), adapter]
    y = qlora.expert_linear(x, weight, offsets, *rest)
    assert_as_good(y, reference.expert_linear, x, weight.dequantize(), offsets, *rest)


@given(
    rows=SIZES,
    columns=SIZES,
    inputs=st.integers(0, 20),
    grouped=st.booleans(),
    format=ANY_FORMAT,
)
def test_the_fallback_is_the_reference(rows, columns, inputs, grouped, format):
    x, weight, bias, lora_a, lora_b = sample(rows, columns, inputs, 4, experts=2, format=format)
    seed, offsets = torch.tensor([5]), torch.tensor([0, inputs // 2, inputs])
    if not grouped:
        weight, bias, lora_a, lora_b = (
            quantized(weight.dequantize()[0], format), bias[0], lora_a[0], lora_b[0],
        )  # fmt: skip
        offsets = None
    rest = [bias, lora_a, lora_b, 0.5, 0.25, seed]
    y, _ = fallback.linear(x, weight.buffers, weight.layout, *rest, offsets, None)
    if grouped:
        assert_as_good(y, reference.expert_linear, x, weight.dequantize(), offsets, *rest)
    else:
        assert_as_good(y, reference.linear, x, weight.dequantize(), *rest)


@pytest.mark.ops("qlora_linear", "qlora_decode")
@pytest.mark.parametrize("inputs", [1, 40])
def test_values_that_are_not_finite_come_through(isa, inputs):
    x, weight, *_ = sample(8, 128, inputs, 4)
    x[0, 3] = torch.nan
    assert qlora.linear(x, weight)[0].isnan().all()
    if inputs > 1:
        assert not qlora.linear(x, weight)[1:].isnan().any()
    spoilt = weight.dequantize()
    spoilt[2, 5] = torch.nan
    y = qlora.linear(torch.ones(inputs, 128), qlora.quantize(spoilt))
    assert y[:, 2].isnan().all() and not y[:, [0, 1, 3, 4, 5, 6, 7]].isnan().any()


@pytest.mark.ops("qlora_linear", "qlora_decode")
def test_the_worked_example_of_the_layer(isa):
    """Two rows of 32, by hand in float64: y, s, t and every gradient."""
    rows = ["1f30415263748596a7b8c9daebfc0d1e", "809dbad7f4112e4b6885a2bfdcf91633"]
    packed = torch.tensor(list(bytes.fromhex("".join(rows))), dtype=torch.uint8)[:, None]
    codebook = torch.tensor(reference.NF4)
    weight = qlora.QuantizedWeight(
        packed, torch.tensor([0.5, 0.25]), codebook, torch.Size([2, 32]), torch.float32,
        qlora.formats["nf4"], 32,
    )  # fmt: skip
    i = torch.arange(32, dtype=torch.float64)
    x = torch.stack([(i % 8 - 3.5) / 4, (3 * i % 8) / 8]).requires_grad_()
    lora_a = ((i % 5 - 2) / 10)[None].requires_grad_()
    lora_b = torch.tensor([[0.5], [-1.0]], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.125, -0.25], dtype=torch.float64, requires_grad=True)
    y = qlora.linear(x, weight, bias, lora_a, lora_b, 2.0)
    y.backward(torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64))

    def same(found, *expected):
        wanted = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found.flatten(), wanted, rtol=0, atol=2e-9)

    same(y.detach(), -0.4628434993, -0.0370111776, 0.1758864086, 0.4592199392)
    same(lora_b.grad, -0.4875, -0.825)
    same(bias.grad, 1.5, 1.0)
    same(lora_a.grad[0, :4], -2.625, -3.1875, -3.75, -0.8125)
    same(lora_a.grad.sum(), -49.0)
    same(x.grad[0, :4], -0.9679914754, 0.45, -0.2376912944, -0.3406542510)
    same(x.grad.sum(), 1.0966638659)


def test_philox_is_the_published_generator():
    words = reference.philox(torch.tensor([0]), 4).tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_the_same_elements_on_every_kernel(isa, dtype):
    """A = identity shows which elements of x the low-rank term saw."""
    x = torch.ones(37, 21, dtype=dtype)
    eye, zero = torch.eye(21, dtype=dtype), torch.zeros(21, 21, dtype=dtype)
    for seed, p in itertools.product([0, -5, 2**40 + 3], [0.1, 0.5]):
        seen = qlora.linear(x, zero, None, eye, eye, 1.0, p, seed) != 0
        assert torch.equal(seen, reference.dropout(x, p, torch.tensor([seed])) != 0)
        assert abs(seen.float().mean() - (1 - p)) < 0.1


@pytest.mark.ops("qlora_linear", "qlora_decode")
@pytest.mark.parametrize("shape", [(4, 96), (4, 80), (64, 48), (4, 32)])
def test_blocks_that_straddle_rows(isa, shape):
    """Here bitsandbytes reads the wrong scales on AVX-512."""
    torch.manual_seed(0)
    weight = qlora.quantize(torch.randn(shape) * torch.arange(1, shape[0] + 1)[:, None], "nf4", 64)
    truth = fallback.dense(weight.buffers, weight.layout)[0]
    assert torch.equal(weight.dequantize(), truth)
    for inputs in (1, 40):
        x = torch.randn(inputs, shape[1])
        assert_as_good(qlora.linear(x, weight), reference.linear, x, truth)


@pytest.mark.ops("qlora_quantize", "qlora_dequantize")
@given(
    columns=SIZES,
    block_size=st.sampled_from([16, 64]),
    dtype=st.sampled_from(DTYPES[:2]),
    format=ANY_FORMAT,
)
def test_quantizing_twice_is_quantizing_once(isa, columns, block_size, dtype, format):
    once = quantized(torch.randn(9, columns).to(dtype), format, block_size)
    again = quantized(once.dequantize(torch.float32), format, block_size)
    if once.format.in_blocks:  # the largest value is the scale; FP4 has two codes of zero
        assert torch.equal(again.dequantize(), once.dequantize(torch.float32))
    else:  # the scale is 127 rounded parts
        assert torch.equal(again.packed, once.packed)


@pytest.mark.ops("qlora_dequantize")
@pytest.mark.parametrize("format", FORMATS)
def test_values_are_linear_in_their_scale(isa, format):
    weight = quantized(torch.randn(9, 64), format)
    twice = replace(weight, absmax=2 * weight.absmax)
    assert torch.equal(twice.dequantize(), 2 * weight.dequantize())
