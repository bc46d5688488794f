"""FP4, int8 and formats of one's own: their codes, by rules that are spelled here once more."""

import dataclasses
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import FORMATS, quantized

from peftkern import qlora
from peftkern.qlora import Format, LoraConfig, QLoRALinear, dequantize, quantize, reference
from peftkern.qlora.bnb import READ_BLOCK_SIZES

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.lists(st.integers(1, 24), min_size=1, max_size=3)


def normal(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def hexadecimal(weight):
    return bytes(weight.packed.flatten().tolist()).hex()


def block(*values, size=32):
    return torch.tensor([*values, *[0.0] * (size - len(values))])


def fp4_code(u):
    """As bitsandbytes' CUDA kernel decides, in Python's own words."""
    sign = 8 if u < 0 else 0
    u = abs(u)
    if u > np.float32(0.29166667):
        if u > np.float32(0.583333):
            return sign + (3 if u > np.float32(0.8333333) else 2)
        return sign + (5 if u > np.float32(0.4166667) else 4)
    if u > np.float32(0.0859375):
        return sign + (7 if u > np.float32(0.20833333) else 6)
    return sign + (1 if u > np.float32(0.00260417) else 0)


def near_the_limits():
    """Every threshold and its neighbours, of either sign."""
    limits = torch.tensor([0.0, *reference.FP4_LIMITS, 1.0])
    near = [limits.nextafter(torch.tensor(t)) for t in (-2.0, 2.0)]
    return torch.cat([limits, *near, -limits, *(-n for n in near)]).clamp(-1, 1).tolist()


@pytest.mark.ops("qlora_quantize")
@given(
    values=st.lists(
        st.one_of(st.sampled_from(near_the_limits()), st.floats(-1, 1, width=32)),
        min_size=1,
        max_size=70,
    ),
    scale=st.sampled_from([1.0, 2.0, 0.3, 1e-30]),
)
def test_fp4_has_the_codes_of_the_cuda_kernel(isa, values, scale):
    weight = torch.tensor([*values, 1.0]) * scale
    found = quantize(weight, "fp4", 4096)
    u = weight * (1 / weight.abs().amax())
    u[u.abs() < torch.finfo(torch.float32).tiny] = 0  # a GPU flushes them
    codes = [fp4_code(x) for x in u.numpy()]
    codes += [0] * (len(codes) % 2)
    assert hexadecimal(found) == "".join(f"{c:x}" for c in codes)


def test_fp4_codes_of_every_value():
    values = [-1, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0]
    values += [0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1]
    weight = quantize(2 * torch.tensor(values * 2), "fp4", 32)
    assert hexadecimal(weight) == "badccee016745523" * 2 and weight.absmax.tolist() == [2.0]


FP4_TIES = block(1, 0.0859375, -0.0859375, -0.00260417, -1e-6, -0.0)


def test_fp4_ties_take_the_smaller_magnitude():
    assert hexadecimal(quantize(FP4_TIES, "fp4", 32)) == "319880" + "00" * 13


def test_bitsandbytes_swaps_the_codes_of_zero_on_a_cpu(bnb):
    packed, _ = bnb.functional.quantize_4bit(FP4_TIES, blocksize=32, quant_type="fp4")
    assert packed[:2].flatten().tolist() == [0x31, 0xE9]


def test_fp4_rows_of_codes_repeat_under_other_scales():
    rows = (torch.arange(64) % 16 - 7.5) / 8 * torch.arange(1, 5)[:, None]
    weight = quantize(rows, "fp4", 64)
    assert hexadecimal(weight) == "bbaadce916452233" * 16
    assert weight.absmax.tolist() == [0.9375, 1.875, 2.8125, 3.75]


@given(
    shape=SHAPES,
    block_size=st.sampled_from(READ_BLOCK_SIZES),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_fp4_has_the_values_of_bitsandbytes(isa, bnb, shape, block_size, dtype, seed):
    """Its CPU kernel swaps the two codes of zero, so bytes may differ where values do not; and it
    takes midpoints, where CUDA and ours take literals that are off by some ulps.
    """
    weight = normal(shape, dtype, seed)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=block_size, quant_type="fp4")
    ours = quantize(weight, "fp4", block_size)
    assert torch.equal(ours.absmax, state.absmax) and torch.equal(ours.codebook, state.code)
    theirs = reference.dequantize(packed, state.absmax, state.code, tuple(shape), block_size)
    scales = ours.absmax.repeat_interleave(block_size)[: weight.numel()].view(shape)
    u = (weight.float() / scales).abs()[..., None]
    clear = ((u - torch.tensor(reference.FP4_LIMITS)).abs() > 1e-6).all(-1)
    assert torch.equal(ours.dequantize(torch.float32)[clear], theirs[clear])


@pytest.mark.parametrize("format", FORMATS)
def test_flushing_subnormal_numbers_changes_no_code(isa, format):
    weight = torch.cat([block(1.0, -1e-39, 1e-39, -0.0, -1e-38, 1e-37), torch.zeros(32)])
    plain = quantized(weight, format, 32)
    torch.set_flush_denormal(True)
    try:
        flushed = quantized(weight, format, 32)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(plain.packed, flushed.packed)


@pytest.mark.ops("qlora_quantize")
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_zeros_nans_and_infinities_stay_in_their_block(isa, format, nested):
    zeros = quantize(torch.zeros(40), format, 32, nested)
    assert torch.equal(zeros.dequantize(), torch.zeros(40))
    assert set(hexadecimal(zeros)) == {"7" if format == "nf4" else "0"}
    if not nested:  # the mean of nested scales would spread a NaN
        for bad in (float("nan"), float("inf")):
            dense = quantize(torch.cat([block(1.0, bad), block(1.0)]), format, 32).dequantize()
            assert not dense[:32].isfinite().any() and torch.equal(dense[32:], block(1.0))


@pytest.mark.ops("qlora_quantize")
def test_int8_has_the_published_codes(isa):
    weight = quantize(torch.tensor([[1, -0.5, 0.25, 0.004], [2, 1, -3, 0.5]]), "int8")
    assert weight.packed.tolist() == [[127, -64, 32, 1], [85, 42, -127, 21]]
    assert weight.absmax.tolist() == [1.0, 3.0]
    ties = quantize(torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5]]), "int8")
    assert ties.packed.tolist() == [[127, 0, 2, 2, 0, -2]]


def of_bitsandbytes(bnb, weight):
    layer = bnb.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
    layer.weight.data = weight
    return layer.to("cpu")  # quantises


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 80),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_int8_has_the_bytes_of_bitsandbytes(isa, bnb, rows, columns, dtype, seed):
    """Of a weight that float16 holds: of quarters there are many ties."""
    weight = ((normal((rows, columns), seed=seed) * 16).round() / 4).to(dtype)
    theirs, ours = of_bitsandbytes(bnb, weight.clone()).weight, quantize(weight, "int8")
    assert torch.equal(ours.packed, theirs.CB) and torch.equal(ours.absmax, theirs.SCB)
    half = normal((rows, columns), torch.float16, seed)
    theirs, ours = of_bitsandbytes(bnb, half.clone()).weight, quantize(half, "int8")
    assert torch.equal(ours.packed, theirs.CB) and torch.equal(ours.absmax, theirs.SCB)


def test_int8_does_not_round_to_float16_first(bnb):
    """bitsandbytes does: its scales are off, and what exceeds float16's range is lost."""
    weight = normal((64, 256))
    theirs, ours = of_bitsandbytes(bnb, weight.clone()).weight, quantize(weight, "int8")
    assert torch.equal(ours.absmax, weight.abs().amax(1))
    assert not torch.equal(theirs.SCB, ours.absmax)
    error = (ours.dequantize() - weight).square().sum()
    dense = bnb.functional.int8_vectorwise_dequant(theirs.CB, theirs.SCB)
    assert error < (dense - weight).square().sum()
    large = weight * 2**20
    assert torch.equal(quantize(large, "int8").packed, ours.packed)
    assert of_bitsandbytes(bnb, large.clone()).weight.SCB.isinf().any()


@given(rows=st.integers(1, 40), columns=st.integers(1, 80), seed=st.integers(0, 99))
def test_int8_decodes_to_the_values_of_bitsandbytes(isa, bnb, rows, columns, seed):
    """It multiplies by the scale and then by 1/127, both rounded: an ulp or two away."""
    weight = quantize(normal((rows, columns), seed=seed), "int8")
    dense = weight.dequantize()
    theirs = bnb.functional.int8_vectorwise_dequant(weight.packed, weight.absmax)
    torch.testing.assert_close(dense, theirs, rtol=3 * 2.0**-23, atol=0)
    exact = weight.packed.double() * weight.absmax.double()[:, None] / 127
    assert ((dense - exact).abs() <= 2.0**-23 * exact.abs()).all()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(dequantize(weight, dtype), dense.to(dtype))


@pytest.mark.ops("qlora_quantize")
def test_int8_rows_of_zeros_nans_and_infinities_stay_alone(isa):
    weight = torch.ones(6, 20)
    weight[0], weight[1, 3], weight[2, 5], weight[3] = 0, float("nan"), -float("inf"), 1e-39
    weight[1, 4] = torch.tensor(0x7FC01234).int().view(torch.float32)  # a NaN with a payload
    found = quantize(weight, "int8")
    assert found.absmax[[0, 3]].tolist() == [0, 0] and found.absmax[2].isinf()
    dense = found.dequantize()
    assert torch.equal(dense[[0, 3]], torch.zeros(2, 20)) and dense[1:3].isnan().all()
    torch.testing.assert_close(dense[4:], torch.ones(2, 20), rtol=2**-22, atol=0)
    assert not found.packed[:3].any()


@pytest.mark.ops("qlora_quantize")
def test_int8_of_experts_is_each_experts_own(isa):
    weight = normal((3, 5, 33))
    whole = quantize(weight, "int8")
    assert whole.absmax.shape == (3, 5) and whole.packed.shape == weight.shape
    parts = torch.stack([quantize(w, "int8").dequantize() for w in weight])
    assert torch.equal(whole.dequantize(), parts)


@pytest.mark.ops("qlora_quantize", "qlora_dequantize")
def test_a_format_of_ones_own_needs_a_codebook_alone(isa):
    """Its thresholds are the midpoints of the sorted values, whatever the order of the codes."""
    values = [0.0, 1.0, -1.0, 0.5, -0.5, 0.25, -0.25, 0.75, -0.75, 0.1, -0.1, 0.3, 0.6, 0.9]
    values += [-0.3, -0.6]
    mine = Format("mine", 4, tuple(values))
    weight = normal((7, 33))
    found = quantize(weight, mine, 32)
    u = weight.flatten() * (1 / found.absmax).repeat_interleave(32)[:231]
    nearest = (u[:, None] - torch.tensor(values)).abs().argmin(1)
    assert torch.equal(
        found.dequantize().flatten(),
        torch.tensor(values)[nearest] * (found.absmax.repeat_interleave(32)[:231]),
    )
    x = normal((3, 33), seed=1)
    torch.testing.assert_close(qlora.linear(x, found), x @ found.dequantize().t())
    with pytest.raises(ValueError, match="^format must be one of nf4, fp4, int8 for bitsandbytes"):
        found.to_bnb()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("x", 3), "^bits must be 4 or 8, got 3"),
        (("x", 4), "^codebook must have 16 values for 4 bits, got 0"),
        (("x", 8, reference.NF4), "^codebook must have 0 values for 8 bits, got 16"),
        (("x", 4, reference.NF4, (0.5, 0.25)), "^thresholds must be 15, rising, got"),
        (("x", 4, reference.NF4, tuple(range(15, 0, -1))), "^thresholds must be 15, rising"),
        (("x", 4, reference.NF4, (), (0,) * 16), "^codes must be each code once"),
    ],
)
def test_a_format_that_no_kernel_reads_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Format(*arguments)


def test_blocks_and_nesting_are_refused_where_a_format_has_none():
    weight = normal((4, 16))
    with pytest.raises(ValueError, match="^block_size must be None for int8, got 64"):
        quantize(weight, "int8", 64)
    with pytest.raises(ValueError, match="^nested must be False for int8, got True"):
        quantize(weight, "int8", nested=True)
    with pytest.raises(ValueError, match=r"^weight must have shape \[..., in\] for int8, got \[\]"):
        quantize(torch.tensor(1.0), "int8")
    with pytest.raises(ValueError, match="^block_size must be left out for int8, .* got 32"):
        LoraConfig(base="int8", block_size=32)


@pytest.mark.parametrize("format", FORMATS)
def test_a_config_takes_any_format_at_its_defaults(format):
    linear = torch.nn.Linear(48, 24)
    layer = QLoRALinear.from_config(linear, LoraConfig(r=2, base=format))
    assert layer.quantized_weight.format.name == format
    assert layer.quantized_weight.nested == layer.quantized_weight.format.in_blocks
    x = normal((5, 48))
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0.4 if format != "int8" else 0.02)


def bits_of(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


@pytest.mark.ops("qlora_dequantize")
def test_fp4_keeps_the_zero_that_a_file_gives_to_code_8(isa):
    """bitsandbytes' map says +0 and its CUDA kernel decodes to -0; a file's map is what counts."""
    weight = quantize(block(1.0, -1e-4), "fp4", 32)
    assert hexadecimal(weight)[:2] == "38" and bits_of(weight.dequantize()[1].item()) == 0
    signed = weight.codebook.clone()
    signed[8] = -0.0
    negative = dataclasses.replace(weight, codebook=signed).dequantize()
    assert bits_of(negative[1].item()) == 1 << 31
