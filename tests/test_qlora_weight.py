"""QuantizedWeight: the bytes of bitsandbytes, both ways without a copy, and where ours differ."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.qlora import LoraConfig, QLoRALinear, dequantize, quantize, reference
from peftkern.qlora.bnb import READ_BLOCK_SIZES

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.lists(st.integers(0, 24), min_size=1, max_size=3).filter(
    lambda s: torch.Size(s).numel()
)
CODEBOOK = torch.tensor(reference.NF4)


def normal(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def codes(weight):
    data = weight.packed.flatten().tolist()
    return "".join(f"{byte:02x}" for byte in data)


def block(*values, size=32):
    return torch.tensor([*values, *[0.0] * (size - len(values))])


@pytest.mark.ops("qlora_quantize")
@given(
    shape=SHAPES,
    block_size=st.sampled_from(READ_BLOCK_SIZES),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_the_bytes_are_those_of_bitsandbytes(isa, bnb, shape, block_size, dtype, seed):
    weight = normal(shape, dtype, seed)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    ours = quantize(weight, "nf4", block_size)
    assert torch.equal(ours.packed, packed) and torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.codebook, state.code)
    assert (ours.shape, ours.dtype) == (state.shape, state.dtype) == (weight.shape, dtype)


@pytest.mark.ops("qlora_quantize")
@pytest.mark.parametrize("block_size", READ_BLOCK_SIZES)
@pytest.mark.parametrize("shape", [(128, 4096), (65, 129), (8193,)])
def test_the_bytes_are_those_of_bitsandbytes_over_many_blocks(isa, bnb, block_size, shape):
    weight = normal(shape)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    ours = quantize(weight, "nf4", block_size)
    assert torch.equal(ours.packed, packed) and torch.equal(ours.absmax, state.absmax)


@given(shape=SHAPES, block_size=st.sampled_from(READ_BLOCK_SIZES), seed=st.integers(0, 99))
def test_nested_scales_are_those_of_bitsandbytes_rounded_to_the_nearest(
    bnb, shape, block_size, seed
):
    """bitsandbytes on a CPU rounds over a grid of 2^-15, and equal scales to a code of -0.99."""
    weight = normal(shape, seed=seed)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=True
    )
    ours = quantize(weight, "nf4", block_size, nested=True)
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.nested_offset, state.offset)
    assert torch.equal(ours.nested_map, state.state2.code)
    assert ours.absmax.dtype == state.absmax.dtype and ours.absmax.shape == state.absmax.shape

    exact = quantize(weight, "nf4", block_size).absmax
    groups = ours.nested_absmax.repeat_interleave(256)[: len(exact)]
    wanted = torch.where(groups > 0, (exact - ours.nested_offset) / groups, 0.0)
    distances = (wanted[:, None] - ours.nested_map).abs()
    chosen = distances.gather(1, ours.absmax.long()[:, None])[:, 0]
    theirs = distances.gather(1, state.absmax.long()[:, None])[:, 0]
    assert (chosen <= distances.amin(1) + 1e-7).all()
    assert (theirs <= chosen + 2**-14)[groups > 0].all()


def test_codes_of_every_value():
    values = [
        -1,
        -0.7,
        -0.5,
        -0.4,
        -0.3,
        -0.2,
        -0.1,
        0,
        0.08,
        0.16,
        0.25,
        0.34,
        0.44,
        0.56,
        0.72,
        1,
    ]
    weight = quantize(2 * torch.tensor(values * 2), "nf4", 32)
    assert codes(weight) == "0123456789abcdef" * 2 and weight.absmax.tolist() == [2.0]


def test_a_tie_takes_the_lower_code():
    thresholds = reference.midpoints(CODEBOOK)
    above = thresholds.nextafter(torch.tensor(2.0))
    ties, raised = (block(*t, *[0.0] * 16, 1.0) for t in (thresholds, above))
    assert codes(quantize(ties, "nf4", 32)) == "0123456789abcde7777777777777777f"
    assert codes(quantize(raised, "nf4", 32)) == "123456789abcdef7777777777777777f"


def test_an_odd_tail_ends_with_the_code_of_zero():
    weight = quantize(torch.linspace(-1, 1, 5), "nf4", 64)
    assert codes(weight) == "027cf7" and weight.packed.shape == (3, 1)
    assert weight.absmax.tolist() == [1.0]
    assert (weight.dequantize() - torch.linspace(-1, 1, 5)).abs().max() < 0.0594
    longer = quantize(normal(65), "nf4", 64)
    assert longer.packed.shape == (33, 1) and longer.absmax.shape == (2,)


def rows():
    return (torch.arange(64) % 16 - 7.5) / 8 * torch.arange(1, 5)[:, None]


def test_a_row_of_codes_repeats_under_other_scales():
    weight = quantize(rows(), "nf4", 64)
    assert codes(weight) == "0012245689bcdeff" * 16
    assert weight.absmax.tolist() == [0.9375, 1.875, 2.8125, 3.75]


def test_nested_scales_have_the_published_values():
    weight = quantize(rows(), "nf4", 64, nested=True)
    assert weight.absmax.tolist() == [0, 47, 207, 255]
    assert (weight.nested_offset.item(), weight.nested_absmax.tolist()) == (2.34375, [1.40625])
    scales = reference.unnest(*weight.buffers[1:2], *weight.buffers[3:])
    assert scales.tolist() == [0.9473876953125, 1.8768310546875, 2.8106689453125, 3.75]
    ones = quantize(torch.ones(64, 64), "nf4", 64, nested=True)
    assert (ones.nested_offset.item(), ones.nested_absmax.tolist()) == (1, [0])
    assert torch.equal(ones.dequantize(), torch.ones(64, 64))


@pytest.mark.ops("qlora_quantize")
@pytest.mark.parametrize("nested", [False, True])
def test_zeros_are_zeros_everywhere(isa, nested):
    for count in (32, 33, 40):
        weight = quantize(torch.zeros(count), "nf4", 32, nested)
        assert set(codes(weight)) == {"7"}
        assert torch.equal(weight.dequantize(), torch.zeros(count))
    tail = quantize(torch.cat([torch.ones(32), torch.zeros(5)]), "nf4", 32)
    assert tail.absmax.tolist() == [1.0, 0.0]  # bitsandbytes: 1e-38


@pytest.mark.ops("qlora_quantize")
def test_magnitudes_without_a_finite_reciprocal_are_zeros(isa):
    weight = quantize(block(1e-39, -2e-39), "nf4", 32)
    assert weight.absmax.tolist() == [0.0]
    assert torch.equal(weight.dequantize(), torch.zeros(32))


@pytest.mark.ops("qlora_quantize")
def test_a_nan_makes_its_block_nan_and_no_other(isa):
    values = torch.cat([block(1.0, float("nan"), 3.0), block(1.0)])
    weight = quantize(values, "nf4", 32)
    assert weight.absmax.isnan().tolist() == [True, False]
    dense = weight.dequantize()
    assert dense[:32].isnan().all() and torch.equal(dense[32:], block(1.0))


@pytest.mark.ops("qlora_quantize")
def test_an_infinity_is_the_scale_of_its_block(isa):
    values = torch.cat([block(1.0, float("inf")), block(1.0)])
    weight = quantize(values, "nf4", 32)
    assert weight.absmax.tolist() == [float("inf"), 1.0]
    dense = weight.dequantize()
    assert not dense[:32].isfinite().any() and torch.equal(dense[32:], block(1.0))


@pytest.mark.ops("qlora_quantize", "qlora_dequantize")
@given(
    shape=SHAPES,
    block_size=st.sampled_from(READ_BLOCK_SIZES),
    nested=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dequantising_is_one_product_and_stable(isa, shape, block_size, nested, seed):
    weight = quantize(normal(shape, seed=seed), "nf4", block_size, nested)
    packed, absmax, codebook, *second = weight.buffers
    scales = reference.unnest(absmax, *second) if second else absmax
    dense = weight.dequantize()
    oracle = reference.dequantize(packed, scales, codebook, weight.shape, block_size)
    assert torch.equal(dense, oracle)
    assert torch.equal(quantize(dense, "nf4", block_size).dequantize(), dense) or nested
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(dequantize(weight, dtype), dense.to(dtype))


def same_storage(first, second):
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_apart(copied, nested):
    weight = quantize(normal((5, 13), torch.bfloat16), "nf4", 32, nested)
    twin = copied(weight)
    assert torch.equal(twin.dequantize(), weight.dequantize())
    facts = ("shape", "dtype", "format", "block_size", "nested", "layout", "nbytes")
    assert all(getattr(twin, name) == getattr(weight, name) for name in facts)
    assert not any(map(same_storage, twin.buffers, weight.buffers))


def test_moving_shares_what_lies_there_already(device):
    weight = quantize(normal((5, 13)), "nf4", 32, nested=True)
    assert all(map(same_storage, weight.to("cpu").buffers, weight.buffers))
    there = weight.to(device)
    assert {t.device.type for t in there.buffers} == {device.type}
    assert torch.equal(there.dequantize().cpu(), weight.dequantize())
    assert {t.device.type for t in weight.to("meta").buffers} == {"meta"}


def test_a_weight_cannot_be_changed():
    weight = quantize(normal((4, 16)), "nf4", 16)
    with pytest.raises(AttributeError):
        weight.packed = weight.packed.clone()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_codes_and_scales_alone(cast):
    layer = QLoRALinear(quantize(normal((8, 64)), nested=True), torch.ones(8), LoraConfig(r=2))
    before = [t.clone() for t in layer.quantized_weight.buffers]
    layer.to(cast)
    assert layer.bias.dtype == layer.lora_A.dtype == cast
    after = layer.quantized_weight.buffers
    assert [t.dtype for t in after] == [t.dtype for t in before]
    assert all(map(torch.equal, after, before))


def test_refused_sizes_and_names():
    weight = normal((4, 16))
    for size in (8, 48, 8192):
        with pytest.raises(ValueError, match=f"^block_size must be one of .*, got {size}"):
            quantize(weight, "nf4", size)
    with pytest.raises(ValueError, match="^format must be one of nf4, fp4, int8, got 'int3'"):
        quantize(weight, "int3")
    with pytest.raises(TypeError, match="^weight must be float32"):
        quantize(weight.long())
