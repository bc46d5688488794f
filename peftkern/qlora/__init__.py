"""LoRA on a quantised linear."""

from peftkern.qlora.codes import dequantize, quantize
from peftkern.qlora.config import LoraConfig
from peftkern.qlora.format import Format, formats
from peftkern.qlora.layer import QLoRALinear
from peftkern.qlora.ops import expert_linear, linear
from peftkern.qlora.weight import QuantizedWeight

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
