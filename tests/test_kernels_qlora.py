"""qlora's Triton launchers against the reference: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import FORMATS, quantized

from peftkern.qlora import fallback

triton_qlora = pytest.importorskip("peftkern.kernels.qlora", reason="needs triton")
from peftkern.kernels import qlora_paths as paths  # noqa: E402
from peftkern.kernels.qlora_gemm import gemm  # noqa: E402


@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    block_size=st.sampled_from([16, 64, 4096]),
    nested=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    format=st.sampled_from(FORMATS),
)
def test_dequantize_is_the_reference(device, shape, block_size, nested, dtype, format):
    weight = quantized(torch.randn(shape), format, block_size, nested).to(device)
    out = torch.empty(shape, dtype=dtype, device=device)
    triton_qlora.dequantize(weight.buffers, weight.layout, out)
    wanted = fallback.dense(weight.buffers, weight.layout).view(shape).to(dtype)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("format", FORMATS)
def test_every_scale_is_rounded_as_in_the_reference(device, format):
    weight = quantized(torch.randn(400, 48), format).to(device)
    out = torch.empty(weight.shape, device=device)
    triton_qlora.dequantize(weight.buffers, weight.layout, out)
    assert torch.equal(out, fallback.dense(weight.buffers, weight.layout)[0])


def bias_alone(bias, dtype):
    """y of no columns."""
    x, y = bias.new_empty(1, 0, dtype=dtype), bias.new_empty(1, len(bias), dtype=dtype)
    with paths.forced(tile=paths.Tile(16, 512, 32, 4, 1, 1)):
        gemm(x, [x.new_empty(len(bias), 0)], [1, len(bias), 0, 0, 0], y, bias=bias)
    return y[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_survives_the_way_to_float_and_back(device, dtype):
    """Those below the normal numbers too, which the interpreter itself reads wrongly."""
    bias = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    y = bias_alone(bias, dtype)
    same = y == bias  # so a NaN is not
    assert torch.equal(~same, bias.isnan()) and torch.equal(y.isnan(), bias.isnan())


def test_every_float_is_rounded_to_bfloat16_as_torch_rounds(device):
    """In the interpreter by `narrow`, since its own conversion cuts off."""
    bits = torch.randint(-(2**31), 2**31, (2**10,)).to(torch.int32)
    edges = torch.tensor(
        [0.0, torch.inf, torch.nan, 3.4e38, 2.0**-133, 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    )
    values = torch.cat([bits.view(torch.float32), edges, -edges]).to(device)
    y = bias_alone(values, torch.bfloat16)
    wanted = values.to(torch.bfloat16)
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y[~wanted.isnan()], wanted[~wanted.isnan()])
