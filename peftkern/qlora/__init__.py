"""LoRA on a quantised linear."""

from peftkern.qlora.config import LoraConfig
from peftkern.qlora.layer import QLoRALinear
from peftkern.qlora.ops import dequantize, expert_linear, linear, quantize
from peftkern.qlora.weight import Format, QuantizedWeight, formats

__all__ = [
    "Format",
    "LoraConfig",
    "QLoRALinear",
    "QuantizedWeight",
    "dequantize",
    "expert_linear",
    "formats",
    "linear",
    "quantize",
]
