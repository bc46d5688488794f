"""Which way the gradient of a csr's values goes on a GPU: tables, data and not code.

sampled    sparse_sample_, in CUDA, makes the products that are asked for: few entries
tiles      Triton makes the whole product, of which tiles are not written
"""

from __future__ import annotations

import torch

from peftkern.kernels.qlora_paths import architecture

# Densities up to which `sampled` wins, by bits of an operand and architecture. Predicted, nobody
# has measured them: 2 b / (s r), of an L2 cache that gives b bytes a second, operands of s bytes,
# and products at r operations a second; those of 32 bits are exact, so no matrix unit makes them.
SAMPLED = {
    16: {"sm80": 0.015, "sm90": 0.0085, "any": 0.0085},
    32: {"sm80": 0.1, "sm90": 0.05, "any": 0.05},
}
WIDTH = 65536  # rows and columns in all: of more, the workspace holds too few tokens at a time


def samples(device: torch.device, dtype: torch.dtype, rows: int, columns: int, nnz: int) -> bool:
    """Whether a csr of so many entries is for `sampled`, where that has a kernel.

    On the host, where kernels in CUDA run for tests alone, it always is.
    """
    if device.type == "cpu":
        return True
    table = SAMPLED[8 * dtype.itemsize]
    most = table.get(architecture(device), table["any"]) * rows * columns
    return nnz <= most and rows + columns <= WIDTH
