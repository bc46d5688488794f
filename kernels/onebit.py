"""onebit's kernels in Triton. Launchers have the ops' own signatures."""

from __future__ import annotations

from peftkern.kernels.onebit_adapter import adapter as adapter
from peftkern.kernels.onebit_adapter import adapter_bwd as adapter_bwd
from peftkern.kernels.onebit_codes import dequantize as dequantize
from peftkern.kernels.onebit_codes import encode as encode
from peftkern.kernels.onebit_codes import pack as pack
from peftkern.kernels.onebit_codes import unpack as unpack
from peftkern.kernels.onebit_latents import quantize as quantize
from peftkern.kernels.onebit_latents import quantize_bwd as quantize_bwd
from peftkern.kernels.onebit_linear import lay_out as lay_out
from peftkern.kernels.onebit_linear import linear as linear
from peftkern.kernels.onebit_statistics import statistics as statistics
