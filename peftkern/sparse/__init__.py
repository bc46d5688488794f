"""Some entries of a weight train, and neither their gradient nor their optimiser is dense."""

from peftkern.sparse.arithmetic import add_, scale_
from peftkern.sparse.config import SparseConfig
from peftkern.sparse.id3 import Id3AdamW
from peftkern.sparse.layer import SparseConv2d, SparseLinear
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
    "SparseConfig",
    "SparseConv2d",
    "SparseLinear",
    "TopGrad",
    "add_",
    "conv2d",
    "gather",
    "import_sara",
    "linear",
    "scale_",
    "scatter_",
    "sddmm",
]
