"""Weights of one bit, two or four, with a mean and a std a matrix; and adapters of them."""

from peftkern.onebit.branch import adapter
from peftkern.onebit.codes import dequantize, pack, quantize, unpack
from peftkern.onebit.config import OneBitConfig
from peftkern.onebit.layer import OneBitAdapter, OneBitLinear
from peftkern.onebit.ops import linear
from peftkern.onebit.published import export_bits, import_bits
from peftkern.onebit.weight import OneBitWeight

__all__ = [
    "OneBitAdapter",
    "OneBitConfig",
    "OneBitLinear",
    "OneBitWeight",
    "adapter",
    "dequantize",
    "export_bits",
    "import_bits",
    "linear",
    "pack",
    "quantize",
    "unpack",
]
