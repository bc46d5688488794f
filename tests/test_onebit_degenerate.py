"""What onebit makes of weights that have no spread, are not finite, or leave a byte half full."""

import itertools
import math

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

from peftkern import onebit
from peftkern.onebit import codes, reference

STEP = ("onebit_statistics", "onebit_quantize", "onebit_quantize_bwd")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.ops(*STEP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", reference.BITS)
def test_equal_elements_have_no_spread(isa, dtype, bits):
    """std is 0 however the mean was rounded: W is the mean, each code the lowest, and a gradient
    reaches every element alike."""
    for value, shape in itertools.product((0.3, 0.0, -1000.1, 1e-30), ((1, 1), (3, 5), (100, 333))):
        weight = torch.full(shape, value, dtype=dtype, requires_grad=True)
        (statistics,) = codes.statistics([weight])
        torch.testing.assert_close(statistics[0], weight[0, 0].detach().to(statistics.dtype))
        assert statistics[1] == 0
        assert not onebit.quantize(weight, bits).packed.any()
        dense = codes.quantized(weight, bits)
        assert torch.equal(dense, statistics[0].to(dtype).expand(shape))
        grad = torch.arange(dense.numel(), dtype=dtype).view(shape) / dense.numel()
        (found,) = torch.autograd.grad(dense, weight, grad)
        wanted = (grad.double().sum() / grad.numel()).to(dtype).expand(shape)
        torch.testing.assert_close(found, wanted)


@pytest.mark.ops(*STEP)
@pytest.mark.parametrize("scale", [1e-4, 1e-5])
def test_a_small_spread_is_a_spread(isa, scale):
    """Of the published start of up, 8.8e-4, and of less: r is not 1, and the step is not std."""
    torch.manual_seed(1)
    weight = (torch.randn(20, 30) * scale).requires_grad_()
    grad = torch.randn(20, 30)
    statistics = codes.statistics([weight])[0]
    assert_as_good(statistics, reference.statistics, weight.detach())

    def gradient(weight, grad, quantized):
        weight = weight.detach().requires_grad_()
        return torch.autograd.grad(quantized(weight), weight, grad.to(weight.dtype))[0]

    found = gradient(weight, grad, lambda w: codes.quantized(w))
    # Factor 4: the slope along the weight divides by a std that was rounded.
    assert_as_good(
        found, lambda w, g: gradient(w, g, lambda w: reference.quantize(w, 1)), weight.detach(),
        grad, factor=4.0,
    )  # fmt: skip


@pytest.mark.ops(*STEP)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", reference.BITS)
def test_one_element_that_is_not_finite_spoils_the_matrix_and_no_other(isa, bad, bits):
    good, spoilt = torch.randn(4, 70), torch.randn(5, 9)
    spoilt[2, 3] = bad
    statistics = codes.statistics([good, spoilt, good])
    assert torch.equal(statistics[0], statistics[2]) and statistics[0].isfinite().all()
    assert not statistics[1].isfinite().any()
    dense = codes.quantize_op([good, spoilt, good], statistics, bits)
    assert dense[1].isnan().all() and torch.equal(dense[0], dense[2]) and dense[0].isfinite().all()
    assert not torch.ops.peftkern.onebit_encode(spoilt, statistics[1], bits).any()
    assert onebit.linear(torch.ones(2, 9), spoilt, bits=bits).isnan().all()
    grads = codes.quantize_bwd_op([torch.ones(5, 9)], [spoilt], statistics[1:2], bits)
    assert grads[0].isnan().all()
    with pytest.raises(ValueError, match="weight must be finite, got a mean of"):
        onebit.quantize(spoilt, bits)


@pytest.mark.ops("onebit_dequantize")
def test_a_mean_that_is_not_finite_comes_through_the_codes(isa):
    packed, one = torch.zeros(3, 2, dtype=torch.uint8), torch.tensor(1.0)
    for mean, std in ((torch.tensor(math.nan), one), (one, torch.tensor(math.nan))):
        weight = onebit.OneBitWeight(packed, mean, std, (3, 9), 1, torch.float32)
        assert weight.dequantize().isnan().all()


@pytest.mark.ops("onebit_statistics")
@given(dtype=st.sampled_from(DTYPES), spread=st.sampled_from([1.0, 1e-2]))
def test_a_large_mean_does_not_drown_the_spread(isa, dtype, spread):
    """The mean of the squares less the square of the mean would lose all of it."""
    torch.manual_seed(1)
    weight = (1000 + spread * torch.randn(64, 65).double()).to(dtype)
    found = codes.statistics([weight])[0]
    truth = torch.stack([weight.double().mean(), weight.double().std()])
    if truth[1] == 0:
        assert found[1] == 0
    else:
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=0)


@pytest.mark.ops(*STEP, "onebit_encode", "onebit_dequantize")
@pytest.mark.parametrize("bits", reference.BITS)
def test_no_size_loses_its_tail(isa, bits):
    torch.manual_seed(bits)
    for count in range(1, 71):
        weight = torch.randn(3, count)
        found = onebit.quantize(weight, bits)
        assert found.nbytes == 3 * math.ceil(count * bits / 8) + 8
        statistics = codes.statistics([weight])
        assert torch.equal(found.dequantize(), codes.quantize_op([weight], statistics, bits)[0])
        padding = (-count * bits) % 8
        assert not (found.packed[:, -1] >> (8 - padding)).any() or padding == 0


@pytest.mark.ops(*STEP)
@pytest.mark.parametrize("bits", reference.BITS)
def test_no_rows_give_no_gradient_and_no_rows(isa, bits):
    weight, bias = torch.randn(5, 9, requires_grad=True), torch.randn(5, requires_grad=True)
    x = torch.randn(0, 9, requires_grad=True)
    y = onebit.linear(x, weight, bias, bits)
    assert y.shape == (0, 5)
    grads = torch.autograd.grad(y.sum(), [x, weight, bias])
    assert [g.shape for g in grads] == [(0, 9), (5, 9), (5,)]
    assert not any(g.any() for g in grads)


@pytest.mark.ops(*STEP)
def test_activations_and_codes_need_not_be_dense(isa):
    torch.manual_seed(1)
    weight, x = torch.randn(6, 8), torch.randn(2, 8, 5).transpose(1, 2)
    assert torch.equal(onebit.linear(x, weight), onebit.linear(x.contiguous(), weight))
    given_codes = torch.randint(0, 2, (16, 3), dtype=torch.uint8).t()
    packed = onebit.pack(given_codes, 1)
    assert torch.equal(packed, onebit.pack(given_codes.contiguous(), 1))
    wide = torch.stack([packed, packed], -1)[..., 0]
    assert not wide.is_contiguous() and torch.equal(onebit.unpack(wide, 1, 16), given_codes)


def test_a_16_bit_weight_hardly_moves_its_own_statistics():
    """Why layers keep it in float32: the statistics of the rounded one are off by 1e-3."""
    torch.manual_seed(1)
    weight = torch.randn(32, 768) * 0.02
    for dtype in (torch.bfloat16, torch.float16):
        found = codes.statistics([weight.to(dtype)])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, codes.statistics([weight]), rtol=1e-2, atol=1e-5)
