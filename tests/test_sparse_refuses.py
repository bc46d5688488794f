"""Does sparse refuse what it cannot do, naming the argument, before anything is written?"""

import pytest
import torch
from sparses import normal, pattern

from peftkern import qlora, sparse

FOUND = pattern(8, 64, 0.2)
X, GRAD, WEIGHT, BIAS = torch.ones(3, 64), torch.ones(3, 8), normal(1, 8, 64), torch.ones(8)
VALUES = torch.ones(FOUND.nnz)
CONV, IMAGES = pattern(4, 12, 0.4), torch.ones(2, 3, 5, 5)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": X.int()}, TypeError, "x must be float32"),
        ({"grad": GRAD.double()}, TypeError, "grad must be float32, got torch.float64"),
        ({"x": X[:, 1:]}, ValueError, r"x must have shape \[..., 64\], got \[3, 63\]"),
        ({"x": torch.ones(())}, ValueError, r"x must have shape \[..., 64\], got \[\]"),
        ({"grad": GRAD[:, 1:]}, ValueError, r"grad must have shape \[..., 8\], got \[3, 7\]"),
        ({"grad": GRAD[:2]}, ValueError, r"grad must have shape \[3, 8\], got \[2, 8\]"),
        ({"grad": GRAD.to("meta")}, ValueError, "grad must be on cpu, got meta"),
        ({"pattern": FOUND.mask()}, TypeError, "pattern must be a Pattern, got Tensor"),
        ({"pattern": FOUND.to("meta")}, ValueError, "pattern must be on cpu, got meta"),
        ({"onto": VALUES[1:]}, ValueError, rf"onto must have shape \[{FOUND.nnz}\]"),
        ({"onto": VALUES.double()}, TypeError, "onto must be float32"),
        ({"onto": VALUES[:1].expand(FOUND.nnz)}, ValueError, "onto must be contiguous"),
    ],
)
def test_sddmm_refuses(change, error, match):
    with pytest.raises(error, match=match):
        sparse.sddmm(**({"x": X, "grad": GRAD, "pattern": FOUND} | change))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": WEIGHT.int()}, TypeError, "weight must be float32"),
        ({"weight": WEIGHT[:7]}, ValueError, r"pattern must have shape \[7, 64\], got \[8, 64\]"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "pattern must be on meta, got cpu"),
        ({"values": VALUES.int()}, TypeError, "values must be float32"),
        ({"values": VALUES[1:]}, ValueError, rf"values must have shape \[{FOUND.nnz}\]"),
        ({"values": VALUES.to("meta")}, ValueError, "values must be on cpu, got meta"),
    ],
)
def test_scatter_refuses_and_leaves_the_weight_alone(change, error, match):
    weight = WEIGHT.clone()
    with pytest.raises(error, match=match):
        sparse.scatter_(**({"weight": weight, "values": VALUES, "pattern": FOUND} | change))
    assert torch.equal(weight, WEIGHT)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": X.int()}, TypeError, "x must be float32"),
        ({"x": X[:, 1:]}, ValueError, r"x must have shape \[..., 64\], got \[3, 63\]"),
        ({"x": X.to("meta")}, ValueError, "weight must be on meta, got cpu"),
        ({"weight": "bits"}, TypeError, "weight must be a Tensor or a QuantizedWeight, got str"),
        ({"weight": WEIGHT.int()}, TypeError, "weight must be float32"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \[out, in\], got \[64\]"),
        (
            {"weight": WEIGHT.clone().requires_grad_()},
            ValueError, "weight must be frozen, got one that asks for the dense gradient",
        ),
        (
            {"weight": qlora.quantize(WEIGHT)},
            ValueError, "form must be delta on a QuantizedWeight",
        ),
        ({"form": "both"}, ValueError, "form must be value or delta, got 'both'"),
        ({"scale": 2.0}, ValueError, "scale must be 1 where the weight holds the values, got 2.0"),
        ({"scale": torch.ones(())}, TypeError, "scale must be a number, got a Tensor"),
        ({"pattern": pattern(8, 63, 0.2)}, ValueError, r"pattern must have shape \[8, 64\]"),
        ({"values": VALUES[1:]}, ValueError, rf"values must have shape \[{FOUND.nnz}\]"),
        ({"bias": BIAS[1:]}, ValueError, r"bias must have shape \[8\], got \[7\]"),
        ({"bias": BIAS.int()}, TypeError, "bias must be float32"),
    ],
)  # fmt: skip
def test_linear_refuses(change, error, match):
    args = {"x": X, "weight": WEIGHT, "values": VALUES, "pattern": FOUND, "bias": BIAS}
    with pytest.raises(error, match=match):
        sparse.linear(**(args | change))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": IMAGES[0]}, ValueError, r"x must have shape \[batch, 3, height, width\]"),
        ({"x": IMAGES[:, :2]}, ValueError, r"x must have shape \[batch, 3, height, width\]"),
        ({"weight": torch.ones(4, 12)}, ValueError, "weight must have shape .out, in, height"),
        ({"weight": qlora.quantize(WEIGHT), "form": "delta"}, TypeError, "weight must be a Tensor"),
        ({"stride": 0}, ValueError, "stride, dilation and groups must be at least 1"),
        ({"padding": -1}, ValueError, "stride, dilation and groups must be at least 1"),
        ({"padding": "same"}, ValueError, "padding must be a number or two of them, got 'same'"),
        ({"groups": 3}, ValueError, "rows a multiple of 3 groups"),
        ({"pattern": pattern(4, 11, 0.4)}, ValueError, r"pattern must have shape \[4, 12\]"),
        ({"weight": torch.ones(4, 3, 2, 2).requires_grad_()}, ValueError, "weight must be frozen"),
    ],
)
def test_conv2d_refuses(change, error, match):
    args = {
        "x": IMAGES, "weight": torch.ones(4, 3, 2, 2), "values": torch.ones(CONV.nnz),
        "pattern": CONV,
    }  # fmt: skip
    with pytest.raises(error, match=match):
        sparse.conv2d(**(args | change))
