"""onebit's CUDA kernel against the reference: on a GPU, or in the emulator."""

from contextlib import nullcontext

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

from peftkern import _native
from peftkern.onebit import fallback, reference
from peftkern.qlora.reference import linear

if "onebit_decode" not in _native.emulated and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor the emulator's library", allow_module_level=True)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
STATISTICS = torch.tensor([[0.1, 0.6]])
# Whole tiles and stages, and less; several splits; rows of codes or of x that no 16 bytes divide.
SHAPES = [(128, 1024), (131, 640), (1, 4096), (3, 128), (40, 100), (7, 33), (5, 136), (2, 0)]


def cuda(device):
    """Where the ops called inside run in CUDA."""
    return _native.Instead(_native.emulated) if device.type == "cpu" else nullcontext()


def packed_codes(rows, columns, bits):
    return reference.pack(torch.randint(2**bits, (rows, columns), dtype=torch.uint8), bits)


def decode(device, x, packed, bits, statistics=STATISTICS, bias=None):
    there = [t.to(device) for t in (x, fallback.in_words(packed), statistics)]
    with cuda(device):
        return torch.ops.peftkern.onebit_decode(
            *there, bits, len(packed), None if bias is None else bias.to(device)
        ).cpu()


def check(device, x, packed, bits, bias=None):
    y = decode(device, x, packed, bits, bias=bias)
    dense = reference.dequantize(packed, STATISTICS.double(), bits, x.shape[1])
    assert_as_good(y, lambda x, w, bias: linear(x, w.to(x.dtype), bias), x, dense, bias)
    return y


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_is_the_reference(device, shape, bits, dtype):
    rows, columns = shape
    packed = packed_codes(rows, columns, bits)
    for inputs in (1, 13):
        check(device, torch.randn(inputs, columns, dtype=dtype), packed, bits, torch.randn(rows))


@given(
    rows=st.integers(0, 140),
    columns=st.integers(0, 40).map(lambda n: 32 * n),
    inputs=st.integers(0, 16),
    bits=st.sampled_from(reference.BITS),
    dtype=st.sampled_from(FLOATS),
    bias=st.sampled_from([None, *FLOATS, torch.float64]),
)
def test_any_size_is_the_reference(device, rows, columns, inputs, bits, dtype, bias):
    x = torch.randn(inputs, columns, dtype=dtype)
    bias = None if bias is None else torch.randn(rows).to(bias)
    check(device, x, packed_codes(rows, columns, bits), bits, bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", reference.BITS)
def test_every_code_meets_its_own_column(device, bits, dtype):
    """Each column of x alone, by powers of two: its code's level, and nothing of another's."""
    columns = 256 // bits
    chosen = torch.randint(2**bits, (4, columns), dtype=torch.uint8)
    levels = torch.tensor(reference.levels(bits))
    levels = levels.to(dtype).float() if bits == 4 else levels
    x = torch.eye(columns) * 2.0 ** (torch.arange(columns) % 9 - 4)
    for begin in range(0, columns, 16):
        some = x[begin : begin + 16].to(dtype)
        statistics = torch.tensor([[0.0, 1.0]])
        y = decode(device, some, reference.pack(chosen, bits), bits, statistics)
        wanted = some.float() @ levels[chosen.long()].t()
        torch.testing.assert_close(y, wanted.to(dtype))


@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_mean_that_dwarfs_the_std_does_not_swallow_the_codes(device, dtype, bits):
    """W rounded to a dtype would be its mean alone; here that is multiplied by nothing."""
    packed, half = packed_codes(40, 128, bits), torch.randn(10, 64).to(torch.bfloat16).to(dtype)
    x = torch.cat([half, -half], 1)
    y = decode(device, x, packed, bits, torch.tensor([[1000.0, 1.0]]))
    level = torch.tensor(reference.levels(bits))[reference.unpack(packed, bits, 128).long()]
    # In float32, parts of the sum of x that cancel are a thousand times what is left.
    factor = {"factor": 1000} if dtype == torch.float32 else {}
    assert_as_good(y, linear, half, level[:, :64] - level[:, 64:], **factor)


@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_stays_in_its_row_of_x(device, dtype, bits):
    x = torch.randn(5, 512, dtype=dtype)
    x[2, 300] = torch.inf
    y = decode(device, x, packed_codes(70, 512, bits), bits)
    assert y[[0, 1, 3, 4]].isfinite().all()
    assert not y[2].isfinite().any()


def test_the_same_call_gives_the_same_bits(device):
    packed, x = packed_codes(70, 4096, 1), torch.randn(4, 4096, dtype=torch.bfloat16)
    assert torch.equal(check(device, x, packed, 1), check(device, x, packed, 1))


def test_memory_that_is_not_there_is_not_read(device):
    packed, x = packed_codes(20, 64, 1), torch.randn(2, 64)
    laid_out = fallback.in_words(packed)
    for wrong, said in (
        ((x, laid_out[:-1], STATISTICS, 1, 20, None), "laid_out must have"),
        ((x, laid_out, STATISTICS[:, :1], 1, 20, None), "statistics must have"),
        ((x, laid_out, STATISTICS.double(), 1, 20, None), "statistics"),
        ((x, laid_out, STATISTICS, 3, 20, None), "bits must be"),
        ((x, laid_out, STATISTICS, 1, 20, torch.randn(19)), "bias must have"),
        ((x.double(), laid_out, STATISTICS, 1, 20, None), "x must be float32"),
        ((torch.randn(17, 64), laid_out, STATISTICS, 1, 20, None), "at most 16 rows"),
        ((torch.randn(64), laid_out, STATISTICS, 1, 20, None), "x must have shape"),
    ):
        there = [t.to(device) if isinstance(t, torch.Tensor) else t for t in wrong]
        with cuda(device), pytest.raises(RuntimeError, match=said):
            torch.ops.peftkern.onebit_decode(*there)
