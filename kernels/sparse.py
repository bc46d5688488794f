"""sparse's kernels in Triton. Launchers have the ops' own signatures."""

from __future__ import annotations

from peftkern.kernels.sparse_adamw import adamw_ as adamw_
from peftkern.kernels.sparse_bits import columns as columns
from peftkern.kernels.sparse_bits import tile_counts as tile_counts
from peftkern.kernels.sparse_conv import conv2d_sddmm as conv2d_sddmm
from peftkern.kernels.sparse_entries import gather as gather
from peftkern.kernels.sparse_entries import scatter_ as scatter_
from peftkern.kernels.sparse_matmul import matmul as matmul
from peftkern.kernels.sparse_matmul import matmul_t as matmul_t
from peftkern.kernels.sparse_sddmm import sddmm as sddmm
from peftkern.kernels.sparse_sddmm import sddmm_ as sddmm_
