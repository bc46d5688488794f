"""Does onebit refuse what it cannot do, naming the argument, before anything is written?"""

import pytest
import torch

from peftkern import onebit
from peftkern.onebit import codes

X, WEIGHT, BIAS = torch.ones(3, 32), torch.randn(8, 32), torch.ones(8)
FOUND = onebit.quantize(WEIGHT)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": X.int()}, TypeError, "x must be float32"),
        ({"x": X[:, :31]}, ValueError, r"x must have shape \[..., 32\], got \[3, 31\]"),
        ({"x": torch.ones(())}, ValueError, r"x must have shape \[..., 32\], got \[\]"),
        ({"x": X.to("meta")}, ValueError, "weight must be on meta, got cpu"),
        ({"weight": "bits"}, TypeError, "weight must be a Tensor or a OneBitWeight, got str"),
        ({"weight": WEIGHT.int()}, TypeError, "weight must be float32"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \[out, in\], got \[32\]"),
        ({"weight": torch.ones(32, 8).t()}, ValueError, "weight must be contiguous"),
        ({"weight": torch.ones(0, 32)}, ValueError, "weight must have an element"),
        ({"bias": BIAS[:7]}, ValueError, r"bias must have shape \[8\], got \[7\]"),
        ({"bias": BIAS.int()}, TypeError, "bias must be float32"),
        ({"bits": 3}, ValueError, "bits must be 1, 2 or 4, got 3"),
        ({"bits": 8}, ValueError, "bits must be 1, 2 or 4, got 8"),
        ({"statistics": torch.ones(2)}, ValueError, r"statistics must have shape \[1, 2\]"),
        ({"statistics": torch.ones(2, 2)}, ValueError, r"statistics must have shape \[1, 2\]"),
        ({"statistics": torch.ones(1, 2).double()}, TypeError, "statistics must be float32"),
        ({"weight": FOUND, "statistics": torch.ones(1, 2)}, ValueError, "must be None beside"),
        ({"weight": FOUND, "x": X[:, :31]}, ValueError, r"x must have shape \[..., 32\]"),
    ],
)
def test_linear_refuses(change, error, match):
    with pytest.raises(error, match=match):
        onebit.linear(**({"x": X, "weight": WEIGHT, "bias": BIAS} | change))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": X.int()}, TypeError, "x must be float32"),
        ({"x": X[:, :31]}, ValueError, r"x must have shape \[..., 32\], got \[3, 31\]"),
        ({"down": WEIGHT[0]}, ValueError, r"down must have shape \[out, in\]"),
        ({"down": WEIGHT.int()}, TypeError, "down must be float32"),
        ({"down": None}, TypeError, "down must be a Tensor, got NoneType"),
        ({"up": torch.ones(32, 7)}, ValueError, r"up must have shape \[out, 8\], got \[32, 7\]"),
        ({"up": torch.ones(8, 32).t()}, ValueError, "up must be contiguous"),
        ({"up": torch.ones(32, 8).double()}, TypeError, "must all be float64 or none"),
        ({"scale": torch.ones(1)}, TypeError, "scale must be a number, got a Tensor"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"activation": "elu"}, ValueError, "activation must be one of identity, relu"),
        ({"residual": torch.ones(3, 31)}, ValueError, r"residual must have shape \[3, 32\]"),
        ({"dropout": 1.5}, ValueError, "dropout must be between 0 and 1, got 1.5"),
        ({"dropout": 0.5, "seed": "3"}, TypeError, "seed must be an int64 tensor or an int"),
        ({"bits": 5}, ValueError, "bits must be 1, 2 or 4, got 5"),
        ({"statistics": torch.ones(1, 2)}, ValueError, r"statistics must have shape \[2, 2\]"),
    ],
)
def test_adapter_refuses(change, error, match):
    with pytest.raises(error, match=match):
        onebit.adapter(**({"x": X, "down": WEIGHT, "up": torch.randn(32, 8)} | change))


PACKED = torch.ones(4, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: onebit.quantize(WEIGHT.int()), TypeError, "weight must be float32"),
        (lambda: onebit.quantize(WEIGHT, 3), ValueError, "bits must be 1, 2 or 4, got 3"),
        (lambda: onebit.quantize(WEIGHT[:, ::2]), ValueError, "weight must be contiguous"),
        (lambda: codes.quantized(WEIGHT, 0), ValueError, "bits must be 1, 2 or 4, got 0"),
        (lambda: codes.statistics([]), ValueError, "weights must hold a Tensor at least"),
        (lambda: codes.statistics([WEIGHT, BIAS]), ValueError, r"weights\[1\] must have shape"),
        (lambda: codes.statistics([WEIGHT, WEIGHT.double()]), TypeError, "all be float64 or none"),
        (lambda: onebit.dequantize(WEIGHT), TypeError, "weight must be a OneBitWeight, got Tensor"),
        (lambda: FOUND.dequantize(torch.int8), TypeError, "dtype must be a float dtype"),
        (lambda: onebit.pack(PACKED.int(), 1), TypeError, "codes must be uint8, got torch.int32"),
        (lambda: onebit.pack(PACKED, 8), ValueError, "bits must be 1, 2 or 4, got 8"),
        (lambda: onebit.pack(PACKED[0, 0], 1), ValueError, r"codes must have shape \[..., width\]"),
        (lambda: onebit.unpack(PACKED.int(), 1, 24), TypeError, "packed must be uint8"),
        (lambda: onebit.unpack(PACKED, 1, 25), ValueError, "rows of 4 bytes for 25 codes, got"),
        (lambda: onebit.unpack(PACKED, 1, 16), ValueError, "rows of 2 bytes for 16 codes, got"),
        (lambda: onebit.unpack(PACKED, 1, -1), ValueError, "for -1 codes"),
    ],
)
def test_codes_refuse(call, error, match):
    with pytest.raises(error, match=match):
        call()


ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"bits": 8}, ValueError, "bits must be 1, 2 or 4, got 8"),
        ({"shape": (4, 25)}, ValueError, r"packed must have shape \[4, 4\], got \[4, 3\]"),
        ({"shape": (4,)}, ValueError, r"shape must be \[out, in\], got \[4\]"),
        ({"packed": PACKED.int()}, TypeError, "packed must be uint8"),
        ({"packed": torch.ones(3, 4).to(torch.uint8).t()}, ValueError, "packed must be contiguous"),
        ({"mean": ONE[None]}, ValueError, r"mean must have shape \[\], got \[1\]"),
        ({"std": ONE.double()}, TypeError, "std must be float32, got torch.float64"),
        ({"std": ONE.to("meta")}, ValueError, "std must be on cpu, got meta"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a float dtype, got torch.int8"),
    ],
)
def test_a_weight_refuses_parts_that_do_not_fit(change, error, match):
    parts = dict(packed=PACKED, mean=ONE, std=ONE, shape=(4, 20), bits=1, dtype=torch.float32)
    onebit.OneBitWeight(**parts)
    with pytest.raises(error, match=match):
        onebit.OneBitWeight(**(parts | change))
