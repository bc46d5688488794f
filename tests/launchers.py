"""What the tests of Triton's launchers draw from, in the interpreter and on a GPU."""

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peftkern.kernels import qlora_paths as paths

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.integers(1, 70)
COLUMNS = st.one_of(SIZES, st.sampled_from([64, 128, 192]))
# Of the interpreter, and smaller and larger ones: several to an axis, and programs that share sums.
TILES = [None, paths.Tile(16, 16, 32, 4, 1, 3), paths.Tile(64, 64, 128, 4, 1, 2)]


def on(device, *tensors):
    return [t if t is None else t.to(device) for t in tensors]


class Rooms(TorchDispatchMode):
    """Counts the tensors that torch makes room for."""

    rooms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.rooms += func._opname in {"empty", "new_empty", "empty_like", "zeros", "new_zeros"}
        return func(*args, **(kwargs or {}))


def counted(run):
    """What it returns, the kernels that it launches, and the tensors that it makes room for."""
    from peftkern.kernels.qlora_forward import sum_kernel  # as good as any

    launches, launch = [], type(sum_kernel).run

    def record(kernel, *args, **kwargs):
        launches.append(kernel.__name__)
        with _disable_current_modes():  # the interpreter has tensors of its own
            return launch(kernel, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, Rooms() as count:
        patch.setattr(type(sum_kernel), "run", record)
        found = run()
    return found, launches, count.rooms
