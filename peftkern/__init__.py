"""Fused kernels for parameter-efficient fine-tuning."""

from peftkern import qlora
from peftkern.qlora import LoraConfig, QLoRALinear

__all__ = ["LoraConfig", "QLoRALinear", "qlora"]
