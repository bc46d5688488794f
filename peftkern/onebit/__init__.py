"""Weights of one bit, two or four, with a mean and a std a matrix; and adapters of them."""

from peftkern.onebit.branch import adapter
from peftkern.onebit.codes import dequantize, pack, quantize, unpack
from peftkern.onebit.ops import linear
from peftkern.onebit.weight import OneBitWeight

__all__ = ["OneBitWeight", "adapter", "dequantize", "linear", "pack", "quantize", "unpack"]
