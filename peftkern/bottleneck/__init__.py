"""A bottleneck beside or behind any module: down, an activation, up, and the residual."""

from peftkern.bottleneck.config import BottleneckConfig
from peftkern.bottleneck.layer import BottleneckAdapter
from peftkern.bottleneck.ops import linear
from peftkern.bottleneck.reference import ACTIVATIONS, Norm

__all__ = ["ACTIVATIONS", "BottleneckAdapter", "BottleneckConfig", "Norm", "linear"]
