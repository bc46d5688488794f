"""Fused kernels for parameter-efficient fine-tuning."""

from peftkern import bottleneck, onebit, qlora, sparse
from peftkern.adapt import Skipped, adapt, trainable_parameters
from peftkern.bottleneck import BottleneckAdapter, BottleneckConfig, MamConfig, PrefixConfig
from peftkern.corda import corda
from peftkern.explain import explain
from peftkern.files import adapter_state_dict, load_adapter, save_adapter
from peftkern.info import Info, info
from peftkern.merge import merge, unmerge
from peftkern.onebit import OneBitConfig
from peftkern.optimize import optimize, register, restore
from peftkern.qlora import LoraConfig, QLoRALinear
from peftkern.report import Report, Row, report
from peftkern.sparse import SparseConfig

__all__ = [
    "BottleneckAdapter",
    "BottleneckConfig",
    "Info",
    "LoraConfig",
    "MamConfig",
    "OneBitConfig",
    "PrefixConfig",
    "QLoRALinear",
    "Report",
    "Row",
    "Skipped",
    "SparseConfig",
    "adapt",
    "adapter_state_dict",
    "bottleneck",
    "corda",
    "explain",
    "info",
    "load_adapter",
    "merge",
    "onebit",
    "optimize",
    "qlora",
    "register",
    "report",
    "restore",
    "save_adapter",
    "sparse",
    "trainable_parameters",
    "unmerge",
]
