"""Whether tensors are still what they were when something was made of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor


class Seen:
    """Tensors as they were: the objects, their storages and the number of writes to them.

    Writes past torch's counter, through `.data` or a pointer, as 8-bit optimisers make them, leave
    no trace: whoever keeps something must let go of it where such a write is to be expected.

    Args:
        tensors: what was looked at.
        scale: a number that must be the same, too.
    """

    def __init__(self, tensors: Sequence[Tensor] = (), scale: float = 1.0) -> None:
        # Not held: whoever shards a weight frees it between its uses. One that is gone is not seen.
        self.tensors = [weakref.ref(tensor) for tensor in tensors]
        self.facts = [scale, *map(_facts, tensors)]

    def is_of(self, tensors: Sequence[Tensor], scale: float = 1.0) -> bool:
        return (
            len(tensors) == len(self.tensors)
            and all(seen() is t for seen, t in zip(self.tensors, tensors, strict=True))
            and self.facts == [scale, *map(_facts, tensors)]
        )


def _facts(tensor: Tensor) -> tuple[int, torch.dtype, torch.device, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.dtype, tensor.device, version
