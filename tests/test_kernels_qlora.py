"""qlora's Triton launchers against the reference: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import FORMATS, quantized

from peftkern.qlora import fallback

triton_qlora = pytest.importorskip("peftkern.kernels.qlora", reason="needs triton")
gemm = pytest.importorskip("peftkern.kernels.qlora_gemm").gemm


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


def test_every_float_is_rounded_to_bfloat16_as_torch_rounds(device):
    """In the interpreter by `narrow`, since its own conversion cuts off."""
    bits = torch.randint(-(2**31), 2**31, (2**10,)).to(torch.int32)
    edges = torch.tensor(
        [0.0, torch.inf, torch.nan, 3.4e38, 2.0**-133, 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    )
    values = torch.cat([bits.view(torch.float32), edges, -edges]).to(device)
    x = torch.ones(1, 0, device=device, dtype=torch.bfloat16)  # no columns: y is the bias
    y = torch.empty(1, len(values), device=device, dtype=torch.bfloat16)
    gemm(x, [x.new_empty(len(values), 0)], [1, len(values), 0, 0, 0], y, bias=values)
    wanted = values.to(torch.bfloat16)
    assert torch.equal(y[0].isnan(), wanted.isnan())
    assert torch.equal(y[0][~wanted.isnan()], wanted[~wanted.isnan()])
