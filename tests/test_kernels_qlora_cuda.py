"""qlora's CUDA kernels against the CPU's and the reference: on a GPU, or in the emulator."""

from contextlib import nullcontext

import pytest
import torch
from close import assert_as_good
from hypothesis import example, given
from hypothesis import strategies as st
from samples import FORMATS, quantized

from peftkern import _native, qlora
from peftkern.qlora import fallback, reference

if "qlora_decode" not in _native.emulated and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor the emulator's library", allow_module_level=True)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = st.sampled_from([0.0, -0.0, 1e-39, 3e-37, 65504.0, torch.inf, -torch.inf, torch.nan])


def cuda(device):
    """Where the ops called inside run in CUDA."""
    return _native.Instead(_native.emulated) if device.type == "cpu" else nullcontext()


def same(actual, wanted):
    """Bit for bit, but for which NaN it is."""
    return actual.dtype == wanted.dtype and torch.equal(
        actual.nan_to_num(7.0).cpu(), wanted.nan_to_num(7.0)
    )


# quantize and dequantize


@given(
    count=st.integers(0, 9000),
    block_size=st.sampled_from([16, 32, 64, 256, 512, 4096]),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    format=st.sampled_from([name for name in FORMATS if name != "int8"]),
    special=st.lists(SPECIAL, max_size=3),
)
@example(count=4097, block_size=4096, dtype=torch.float16, format="nf4", special=[torch.nan])
@example(count=64, block_size=64, dtype=torch.bfloat16, format="fp4", special=[torch.inf, 0.0])
def test_codes_are_the_bytes_of_the_cpu(device, count, block_size, dtype, format, special):
    weight = torch.randn(count)
    weight[torch.randint(max(count, 1), (len(special) if count else 0,))] = torch.tensor(special)[
        : len(special) if count else 0
    ]
    weight = weight.to(dtype)
    wanted = qlora.quantize(weight, format, block_size)
    with cuda(device):
        actual = qlora.quantize(weight.to(device), format, block_size)
    assert torch.equal(actual.packed.cpu(), wanted.packed)
    assert same(actual.absmax, wanted.absmax)


@pytest.mark.parametrize("size", [16, 64, 512])
@pytest.mark.parametrize("scale", [0.0, 1e-39, 3e-37, 1.0])
def test_a_block_that_has_no_reciprocal_is_zeros(device, size, scale):
    weight = torch.randn(3 * size) * scale
    wanted = qlora.quantize(weight, "nf4", size)
    with cuda(device):
        actual = qlora.quantize(weight.to(device), "nf4", size)
    assert torch.equal(actual.packed.cpu(), wanted.packed)
    assert torch.equal(actual.absmax.cpu(), wanted.absmax)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_ties_take_the_code_that_they_take_on_the_cpu(device, format):
    thresholds, _ = qlora.formats[format].tables(torch.device("cpu"))
    beside = [torch.nextafter(thresholds, torch.full([15], end)) for end in (-2.0, 2.0)]
    weight = torch.cat([thresholds, *beside, torch.tensor([1.0])])
    with cuda(device):
        actual = qlora.quantize(weight.to(device), format, 64)
    assert torch.equal(actual.packed.cpu(), qlora.quantize(weight, format, 64).packed)


@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 3000),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    special=st.lists(SPECIAL, max_size=3),
)
@example(rows=3, columns=2056, dtype=torch.bfloat16, special=[])
def test_codes_of_rows_are_the_bytes_of_the_cpu(device, rows, columns, dtype, special):
    weight = torch.randn(rows, columns)
    for value in special if weight.numel() else []:
        weight.view(-1)[torch.randint(weight.numel(), (1,))] = value
    weight = weight.to(dtype)
    wanted = qlora.quantize(weight, "int8")
    with cuda(device):
        actual = qlora.quantize(weight.to(device), "int8")
    assert torch.equal(actual.packed.cpu(), wanted.packed)
    assert same(actual.absmax, wanted.absmax)


@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 3000)),
    block_size=st.sampled_from([16, 64, 4096]),
    nested=st.booleans(),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    format=st.sampled_from(FORMATS),
)
@example(shape=(5, 2056), block_size=64, nested=True, dtype=torch.bfloat16, format="nf4")
@example(shape=(5, 2056), block_size=64, nested=True, dtype=torch.float16, format="int8")
def test_values_are_the_bytes_of_the_cpu(device, shape, block_size, nested, dtype, format):
    weight = quantized(torch.randn(shape), format, block_size, nested)
    with cuda(device):
        actual = qlora.dequantize(weight.to(device), dtype)
    assert torch.equal(actual.cpu(), qlora.dequantize(weight, dtype))


# decode

# Whole tiles and stages, and less; rows that are whole blocks, that share them, that are not even
# whole bytes; each of the layouts, and what none of them serves.
SHAPES = [
    (64, 512, 64), (70, 1088, 64), (3, 64, 128), (65, 1056, 32), (20, 288, 16), (5, 96, 4096),
    (40, 100, 64), (7, 33, 16), (2, 0, 64), (1, 2048, 256),
]  # fmt: skip


def plain(x, weight, bias, down, lora_b, scale):
    y = reference.linear(x, weight, bias)
    return y if down is None else y + scale * (down.to(x.dtype) @ lora_b.to(x.dtype).t())


def check_decode(device, x, weight, bias=None, down=None, lora_b=None, scale=0.5):
    there = [None if t is None else t.to(device) for t in (bias, down, lora_b)]
    with cuda(device):
        y = torch.ops.peftkern.qlora_decode(
            x.to(device), weight.to(device).buffers, weight.layout, *there, scale
        )
    dense = fallback.dense(weight.buffers, weight.layout)[0]
    assert_as_good(y.cpu(), lambda x, w, *rest: plain(x, w.to(x.dtype), *rest, scale), x, dense,
                   bias, down, lora_b)  # fmt: skip
    return y


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_is_the_reference(device, shape, nested, dtype):
    rows, columns, block_size = shape
    weight = quantized(torch.randn(rows, columns), "nf4", block_size, nested)
    for inputs, rank in ((1, 0), (8, 3), (13, 16)):
        x, bias = torch.randn(inputs, columns, dtype=dtype), torch.randn(rows, dtype=dtype)
        low = torch.randn(inputs, rank), torch.randn(rows, rank, dtype=dtype)
        check_decode(device, x, weight, bias, *(low if rank else ()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", ["fp4", "int8"])
@pytest.mark.parametrize("shape", [(70, 1040), (5, 37)], ids=str)
def test_decode_serves_every_format(device, shape, format, dtype):
    weight = quantized(torch.randn(shape), format)
    for inputs in (1, 16):
        check_decode(device, torch.randn(inputs, shape[1], dtype=dtype), weight)


@given(
    rows=st.integers(0, 140),
    columns=st.integers(0, 70).map(lambda n: 16 * n),
    inputs=st.integers(0, 16),
    dtype=st.sampled_from(FLOATS),
    others=st.sampled_from([*FLOATS, torch.float64]),
)
def test_bias_and_lora_b_may_have_another_dtype(device, rows, columns, inputs, dtype, others):
    weight = quantized(torch.randn(rows, columns), "nf4")
    bias, lora_b = torch.randn(rows).to(others), torch.randn(rows, 4).to(others)
    x = torch.randn(inputs, columns, dtype=dtype)
    check_decode(device, x, weight, bias, torch.randn(inputs, 4), lora_b)


def test_decode_reads_x_that_is_not_aligned(device):
    weight = quantized(torch.randn(20, 256), "nf4")
    x = torch.randn(3 * 256 + 1, dtype=torch.bfloat16)[1:].view(3, 256)
    check_decode(device, x, weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_stays_in_its_row_of_x(device, dtype):
    weight = quantized(torch.randn(70, 512), "nf4")
    x = torch.randn(5, 512, dtype=dtype)
    x[2, 300] = torch.inf
    with cuda(device):
        y = torch.ops.peftkern.qlora_decode(
            x.to(device), weight.to(device).buffers, weight.layout, None, None, None, 1.0
        )
    assert y[[0, 1, 3, 4]].isfinite().all()
    assert not y[2].isfinite().any()


def test_the_same_call_gives_the_same_bits(device):
    weight, x = quantized(torch.randn(70, 2048), "nf4"), torch.randn(4, 2048, dtype=torch.bfloat16)
    assert torch.equal(check_decode(device, x, weight), check_decode(device, x, weight))
