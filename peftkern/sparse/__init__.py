"""Some entries of a weight train, and neither their gradient nor their optimiser is dense."""

from peftkern.sparse.id3 import Id3AdamW
from peftkern.sparse.linear import conv2d, linear
from peftkern.sparse.ops import gather, scatter_, sddmm
from peftkern.sparse.pattern import Pattern
from peftkern.sparse.published import import_sara
from peftkern.sparse.sara import SaraAdamW
from peftkern.sparse.select import AbsThreshold, Budget, SmallestFraction, TopGrad

__all__ = [
    "AbsThreshold",
    "Budget",
    "Id3AdamW",
    "Pattern",
    "SaraAdamW",
    "SmallestFraction",
    "TopGrad",
    "conv2d",
    "gather",
    "import_sara",
    "linear",
    "scatter_",
    "sddmm",
]
