"""What the tests of Triton's launchers draw from, in the interpreter and on a GPU."""

import torch
from hypothesis import strategies as st

from peftkern.kernels import qlora_paths as paths

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.integers(1, 70)
COLUMNS = st.one_of(SIZES, st.sampled_from([64, 128, 192]))
# Of the interpreter, and smaller and larger ones: several to an axis, and programs that share sums.
TILES = [None, paths.Tile(16, 16, 32, 4, 1, 3), paths.Tile(64, 64, 128, 4, 1, 2)]


def on(device, *tensors):
    return [t if t is None else t.to(device) for t in tensors]
