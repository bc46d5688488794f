"""A bottleneck beside or behind any module: down, an activation, up, and the residual."""

from peftkern.bottleneck.ops import linear
from peftkern.bottleneck.reference import ACTIVATIONS, Norm

__all__ = ["ACTIVATIONS", "Norm", "linear"]
