"""What every public function does with what it is given, before an op is called."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(x: Tensor) -> Tensor:
    """x as `torch.nn.functional.linear` casts it."""
    if not torch._C._is_any_autocast_enabled():  # a tenth of the cost of asking for one device
        return x
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def seed(given: Tensor | int | None, device: torch.device) -> Tensor:
    """Drawn by torch where none is given, so that activation checkpointing replays it."""
    if isinstance(given, Tensor):
        return given
    if given is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    # Filled there: a copy from the host would wait, and no CUDA graph could hold it.
    return torch.full([1], given, dtype=torch.int64, device=device)
