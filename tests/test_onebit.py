"""Is every kernel of onebit the reference, on every instruction set that this machine has?"""

import math

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

from peftkern import _native, onebit
from peftkern.onebit import codes, fallback, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = st.integers(1, 70)
BITS = st.sampled_from(reference.BITS)
SHAPES = st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4)

# Float32 roundings of the published levels, the upper half of them.
PUBLISHED = {
    1: [0.6744897501960817],
    2: [0.3777541518, 1.2657203674],
    4: [
        0.1055502817, 0.3190360069, 0.5400720835, 0.7751920223,
        1.0340062380, 1.3331066370, 1.7077375650, 2.2654905319,
    ],
}  # fmt: skip


@pytest.mark.parametrize("bits", reference.BITS)
def test_the_levels_are_the_published_ones(bits):
    levels = reference.levels(bits)
    assert list(levels) == [-v for v in reversed(levels)] == sorted(levels)
    upper = torch.tensor(levels[2 ** (bits - 1) :])
    rounded = upper if bits > 1 else upper.double()
    wanted = torch.tensor(PUBLISHED[bits], dtype=rounded.dtype)
    torch.testing.assert_close(rounded, wanted, rtol=0, atol=1e-9 if bits > 1 else 1e-7)
    if bits == 1:
        assert abs(levels[1] - PUBLISHED[1][0]) < 1e-15


@pytest.mark.ops("onebit_dequantize")
@pytest.mark.parametrize("bits", reference.BITS)
def test_kernels_know_the_levels_of_the_reference(isa, bits):
    packed = onebit.pack(torch.arange(2**bits, dtype=torch.uint8)[None], bits)
    standard = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    found = codes.dequantize_op(packed, standard, bits, 2**bits, torch.float64)
    assert found.flatten().tolist() == list(reference.levels(bits))


# In float64, by hand: no element on a threshold, and one on it (w[1, 1] = 0 = mean).
WEIGHT = [[0.5, -1, 0.25, 0.75], [-0.25, 0.125, 1, -1.25]]
TIED = [[0.5, -1, 0.25, 0.75], [-0.25, 0, 1, -1.25]]
STEP = ("onebit_statistics", "onebit_quantize", "onebit_quantize_bwd")


def step(weight):
    """y, the gradients of x and of the weight: x = 1, 2, 3, 4 and the gradient of y is 1, -1."""
    x = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    y = onebit.linear(x, weight)
    return [y, *torch.autograd.grad(y, [x, weight], torch.tensor([[1.0, -1]], dtype=y.dtype))]


def same(found, *wanted, tolerance=1e-14):
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.detach().flatten(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.ops(*STEP)
def test_the_worked_example_without_a_tie(isa):
    weight = torch.tensor(WEIGHT, dtype=torch.float64)
    same(codes.statistics([weight]), 0.015625, 0.8030007894498877)
    same(reference.levels(1)[1] * codes.statistics([weight])[:, 1], 0.5416158018833112)
    packed = onebit.quantize(weight).packed
    assert onebit.unpack(packed, 1, 4).flatten().tolist() == [1, 0, 1, 1, 0, 1, 1, 0]
    assert onebit.pack(onebit.unpack(packed, 1, 4).view(1, 8), 1).item() == 0x6D
    y, grad_x, grad = step(WEIGHT)
    same(y, 3.405944811299867, 0.15625)
    same(grad_x, 1.0832316037666223, -1.0832316037666223, 0, 1.0832316037666223)
    same(
        grad,
        0.8926533037875182, 2.225030764707931, 2.948026716530789, 3.837217625380253,
        -0.9411268329202782, -2.024211858300782, -3.2180935216990236, -3.719496197486407,
    )  # fmt: skip


@pytest.mark.ops(*STEP)
def test_the_worked_example_with_a_tie(isa):
    weight = torch.tensor(TIED, dtype=torch.float64)
    same(codes.statistics([weight]), 0, 0.8017837257372732)
    packed = onebit.quantize(weight).packed
    assert onebit.pack(onebit.unpack(packed, 1, 4).view(1, 8), 1).item() == 0x4D
    y, grad_x, grad = step(TIED)
    same(y, 3.2447694293029024, -2.1631796195352684)
    same(grad_x, 1.0815898097676342, 0, 0, 1.0815898097676342)
    same(
        grad,
        1.1008832276, 1.7981836567, 3.0504104337, 4.1512936613,
        -1.0504353778, -1.9999750559, -2.7981711847, -4.2521893609,
        tolerance=1e-10,
    )  # fmt: skip


def latents(shapes, dtype, shift=0.0):
    torch.manual_seed(len(shapes) + sum(a * b for a, b in shapes))
    return [(torch.randn(shape).double() + shift).to(dtype) for shape in shapes]


@pytest.mark.ops("onebit_statistics")
@given(shapes=SHAPES, dtype=st.sampled_from(DTYPES), shift=st.sampled_from([0, 0.65, 1000]))
def test_statistics_are_the_reference(isa, shapes, dtype, shift):
    weights = latents(shapes, dtype, shift)
    found = codes.statistics(weights)
    for one, weight in zip(found, weights, strict=True):
        assert torch.equal(one, codes.statistics([weight])[0])
        assert_as_good(one, reference.statistics, weight.to(found.dtype))


@pytest.mark.ops("onebit_statistics")
def test_statistics_of_many_pieces_are_the_reference(isa):
    weights = latents([(300, 331), (1, 1), (64, 64), (1, 4097)], torch.float32, 10)
    for one, weight in zip(codes.statistics(weights), weights, strict=True):
        assert_as_good(one, reference.statistics, weight)


@pytest.mark.ops("onebit_quantize", "onebit_encode")
@given(shapes=SHAPES, dtype=st.sampled_from(DTYPES), bits=BITS)
def test_codes_and_values_are_the_reference(isa, shapes, dtype, bits):
    weights = latents(shapes, dtype)
    for weight in weights:
        weight[0, 0] = 0  # so that one lies on a threshold where the mean is 0
    statistics = fallback.statistics(weights)
    statistics[0, 0] = 0
    found = codes.quantize_op(weights, statistics, bits)
    for a, b in zip(found, fallback.quantize(weights, statistics, bits), strict=True):
        assert torch.equal(a, b)
    for row, weight in zip(statistics, weights, strict=True):
        packed = torch.ops.peftkern.onebit_encode(weight, row, bits)
        assert torch.equal(packed, fallback.encode(weight, row, bits))


@pytest.mark.ops("onebit_quantize", "onebit_encode")
@pytest.mark.parametrize("bits", reference.BITS)
def test_a_value_on_a_threshold_takes_the_lower_code(isa, bits):
    """Powers of two, so that nothing is rounded: the step is 1, and the mean is 0."""
    statistics = torch.tensor([[0.0, 1 - reference.EPS]], dtype=torch.float64)
    limits = torch.tensor(reference.thresholds(bits), dtype=torch.float64)
    assert statistics[0, 1] + reference.EPS == 1
    for weight, raised in ((limits, 0), (limits.nextafter(torch.tensor(math.inf).double()), 1)):
        packed = torch.ops.peftkern.onebit_encode(weight[None], statistics, bits)
        wanted = torch.arange(len(limits), dtype=torch.uint8) + raised
        assert torch.equal(onebit.unpack(packed, bits, len(limits))[0], wanted)


@pytest.mark.ops("onebit_quantize_bwd")
@given(shapes=SHAPES, dtype=st.sampled_from(DTYPES), bits=BITS, narrow=st.booleans())
def test_the_gradient_is_the_closed_form(isa, shapes, dtype, bits, narrow):
    weights = latents(shapes, dtype)
    statistics = fallback.statistics(weights)
    grads = [torch.randn_like(w.to(w.dtype if narrow else statistics.dtype)) for w in weights]
    found = codes.quantize_bwd_op(grads, weights, statistics, bits)
    for grad, given_grad, weight, row in zip(found, grads, weights, statistics, strict=True):
        chosen = reference.codes(weight, row, bits)

        def closed_form(given_grad, weight, row, chosen=chosen):
            return reference.quantize_bwd(given_grad, weight, row, bits, chosen)

        assert_as_good(grad, closed_form, given_grad, weight, row)


@pytest.mark.ops("onebit_pack")
@pytest.mark.parametrize("bits", reference.BITS)
def test_packing_is_the_reference_for_every_width(isa, bits):
    torch.manual_seed(bits)
    for width in [*range(71), 127, 128, 129, 1000, 16384]:
        rows = 300 if width in (64, 65, 1000) else 3
        given_codes = torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8)
        packed = onebit.pack(given_codes, bits)
        assert torch.equal(packed, reference.pack(given_codes, bits))
        assert torch.equal(onebit.unpack(packed, bits, width), given_codes)
        packed = torch.randint(0, 256, packed.shape, dtype=torch.uint8)  # padding that is not zero
        wanted = reference.unpack(packed, bits, width)
        assert torch.equal(onebit.unpack(packed, bits, width), wanted)


@pytest.mark.ops("onebit_pack")
def test_the_lowest_bits_come_first(isa):
    for bits, given_codes, packed in [
        (2, [0, 1, 2, 3], [0xE4]),
        (4, [1, 2], [0x21]),
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0x81, 0x01]),
        (1, [255, 254], [0x01]),
    ]:
        assert onebit.pack(torch.tensor(given_codes, dtype=torch.uint8), bits).tolist() == packed
    for shape in [(), (3,), (2, 3), (0,), (2, 0)]:
        packed = onebit.pack(torch.zeros(*shape, 5, dtype=torch.uint8), 2)
        assert packed.shape == (*shape, 2) and onebit.unpack(packed, 2, 5).shape == (*shape, 5)


@pytest.mark.ops("onebit_dequantize", "onebit_encode")
@given(
    rows=SIZES,
    columns=st.one_of(SIZES, st.sampled_from([512, 700])),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    bits=BITS,
)
def test_dequantize_is_the_reference(isa, rows, columns, dtype, out, bits):
    (weight,) = latents([(rows, columns)], dtype)
    found = onebit.quantize(weight, bits)
    assert found.shape == weight.shape and found.dtype == dtype
    wanted = reference.dequantize(found.packed, found.statistics, bits, columns).to(out)
    assert torch.equal(found.dequantize(out), wanted)
    dense = codes.quantize_op([weight], found.statistics, bits)[0]
    assert torch.equal(found.dequantize(), dense)


@pytest.mark.ops(*STEP)
@pytest.mark.parametrize("bits", reference.BITS)
def test_scaling_and_shifting_the_weight_scales_and_shifts_what_it_stands_for(isa, bits):
    """But for the 1e-5; negating it turns every code over."""
    (weight,) = latents([(24, 31)], torch.float64)
    found, other = onebit.quantize(weight, bits), onebit.quantize(weight * 2 + 3, bits)
    assert torch.equal(found.packed, other.packed)
    torch.testing.assert_close(other.dequantize(), found.dequantize() * 2 + 3)
    turned = onebit.unpack(onebit.quantize(-weight, bits).packed, bits, 31)
    assert torch.equal(turned, 2**bits - 1 - onebit.unpack(found.packed, bits, 31))
    torch.testing.assert_close(onebit.quantize(-weight, bits).dequantize(), -found.dequantize())


@given(
    rows=st.sampled_from([1, 3, 32, 100, 768]),
    columns=st.sampled_from([1, 7, 8, 31, 32, 33, 768]),
    inputs=st.sampled_from([0, 1, 5, 197]),
    shift=st.sampled_from([0.0, 0.65, 1000.0]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    bits=BITS,
)
def test_linear_is_the_reference(isa, rows, columns, inputs, shift, dtype, bias, bits):
    (weight,) = latents([(rows, columns)], torch.float32, shift)
    x, b = torch.randn(inputs, columns).to(dtype), torch.randn(rows) if bias else None
    y = onebit.linear(x, weight, b, bits)
    statistics = codes.statistics([weight])
    dense = codes.quantize_op([weight], statistics, bits)[0]

    def plain(x, dense, b):
        y = x @ dense.to(x.dtype).t()
        return y if b is None else y + b.to(x.dtype)

    assert_as_good(y, plain, x, dense, b)
    given_statistics = onebit.linear(x, weight, b, bits, statistics)
    assert torch.equal(given_statistics, y)


@pytest.mark.parametrize("bits", reference.BITS)
def test_the_fallback_of_a_packed_linear_is_the_reference(bits):
    (latent,), x, bias = latents([(9, 13)], torch.float32), torch.randn(2, 3, 13), torch.randn(9)
    with _native.Instead(_native.references):
        weight = onebit.quantize(latent, bits)
        y = onebit.linear(x, weight, bias)
    assert_as_good(y, lambda x, dense, b: x @ dense.t() + b, x, weight.dequantize(), bias)
