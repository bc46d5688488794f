"""qlora's Triton launchers against the reference: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import FORMATS, quantized

from peftkern.qlora import fallback

triton_qlora = pytest.importorskip("peftkern.kernels.qlora", reason="needs triton")


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
    if dtype == torch.bfloat16 and device.type == "cpu":
        # Triton's interpreter cuts off where a GPU rounds to nearest: a bf16 may be one too small.
        torch.testing.assert_close(out, wanted, rtol=2**-7, atol=0)
    else:
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("format", FORMATS)
def test_every_scale_is_rounded_as_in_the_reference(device, format):
    weight = quantized(torch.randn(400, 48), format).to(device)
    out = torch.empty(weight.shape, device=device)
    triton_qlora.dequantize(weight.buffers, weight.layout, out)
    assert torch.equal(out, fallback.dense(weight.buffers, weight.layout)[0])
