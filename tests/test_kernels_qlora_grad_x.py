"""The gradient of x by the forward's own products, against the reference: on a GPU, or in the
interpreter."""

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from launchers import COLUMNS, DTYPES, SIZES, TILES, on
from samples import FORMATS, sample

from peftkern.qlora import reference
from peftkern.qlora.ops import operand

pytest.importorskip("triton", reason="needs triton")
from peftkern.kernels import qlora_panels as panels  # noqa: E402
from peftkern.kernels import qlora_paths as paths  # noqa: E402
from peftkern.kernels.qlora_gemm import gemm  # noqa: E402


@pytest.mark.parametrize("path", ["gemm", "panels"])
@given(
    rows=SIZES,
    columns=COLUMNS,
    inputs=st.integers(0, 40),
    nested=st.booleans(),
    dtype=DTYPES,
    p=st.sampled_from([0.0, 0.25, 1.0]),
    format=st.sampled_from(FORMATS),
    tile=st.sampled_from(TILES),
)
def test_the_same_products_give_the_gradient_of_x(
    device, path, rows, columns, inputs, nested, dtype, p, format, tile
):
    _, weight, _, lora_a, _ = sample(rows, columns, inputs, 4, dtype, nested=nested, format=format)
    grad, up = torch.randn(inputs, rows, dtype=dtype), torch.randn(inputs, 4)
    weight, lora_a, grad, up, seed = on(device, weight, lora_a, grad, up, torch.tensor([5]))
    out = torch.empty(inputs, columns, dtype=dtype, device=device)
    rest = [*operand(weight), out]
    with paths.forced(tile=tile):
        if path == "gemm":
            gemm(grad, *rest, None, up, lora_a, 0.5, None, None, p, seed, over_rows=True)
        else:
            panels.grad_x(grad, *rest, up, lora_a, 0.5, None, None, p, seed)

    def plain(grad, dense, up, lora_a):
        low = reference.dropout(up.to(grad.dtype) @ lora_a, p, seed)
        return grad @ dense.to(grad.dtype) + 0.5 * low

    assert_as_good(out, plain, grad, weight.dequantize(torch.float32), up, lora_a)


@pytest.mark.parametrize("size", [1, 20_000])
def test_the_gradient_of_x_may_take_several_panels_too(device, size, monkeypatch):
    """Of 128 columns each, and one that is narrower."""
    monkeypatch.setattr(panels, "PANEL_BYTES", size)
    _, weight, *_ = on(device, *sample(64, 320, 1, 4))
    grad, out = torch.randn(40, 64, device=device), torch.empty(40, 320, device=device)
    panels.grad_x(grad, *operand(weight), out, None, None, 1.0, None, None, 0.0, None)
    assert_as_good(out, torch.matmul, grad, weight.dequantize())
