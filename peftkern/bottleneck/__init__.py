"""A bottleneck beside or behind any module: down, an activation, up, and the residual."""

from peftkern.bottleneck.config import BottleneckConfig
from peftkern.bottleneck.conformer import ConformerAdapter
from peftkern.bottleneck.convolution import ConvAdapter
from peftkern.bottleneck.layer import BottleneckAdapter
from peftkern.bottleneck.mam import MamConfig, PrefixConfig
from peftkern.bottleneck.ops import linear
from peftkern.bottleneck.reference import ACTIVATIONS, Norm

__all__ = [
    "ACTIVATIONS",
    "BottleneckAdapter",
    "BottleneckConfig",
    "ConformerAdapter",
    "ConvAdapter",
    "MamConfig",
    "Norm",
    "PrefixConfig",
    "linear",
]
