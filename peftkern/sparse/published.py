"""The checkpoint that SaRA was published with, read into a model.

    {"threshold": t, 0: values, 1: values, ...}     by the number in `model.parameters()`

values = parameter[|base| < t], row by row. There are no places in it: they are found again in the
base, which must be the one that was trained, to the last bit and in the same dtype.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftkern.sparse.pattern import Pattern
from peftkern.sparse.support import attach

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def import_sara(
    model: Model, path: str | os.PathLike[str] | Mapping[Any, Any], scale: float = 1.0
) -> Model:
    """Gives a base model the values of a published checkpoint; they train on from there.

        weight = base + scale * (values - base)   on the places of the values

    In place, and all or nothing. What the checkpoint has nothing for stays as it is.

    Args:
        model: the base, unadapted.
        path: the file, or what is in it.
        scale: how much of what was learned, a finite number: 0 to 2, published.

    Returns:
        The same model, each of whose parameters with values has a support.

    Raises:
        TypeError: values that are not float.
        ValueError: no such checkpoint, or one of another base; another scale.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    found: Any = path
    if not isinstance(path, Mapping):
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or "threshold" not in found:
        told = type(found).__name__ if found is path else path
        raise ValueError(f"path must hold a published checkpoint with its threshold, got {told}")
    threshold, parameters = float(found["threshold"]), list(model.named_parameters())
    numbers = [key for key in found if key != "threshold"]
    if strange := [n for n in numbers if n not in range(len(parameters))]:
        raise ValueError(
            f"path must hold values by number, of {len(parameters)} parameters, got {strange[0]!r}"
        )
    patterns, values = {}, {}
    for number, (name, base) in enumerate(parameters):
        # In the base's own dtype, to which a comparison rounds the threshold, as it did then.
        pattern = Pattern.from_mask(base.detach().abs() < threshold)
        _check_values(name, pattern.nnz, found.get(number, torch.empty(0)))
        if pattern.nnz:
            patterns[name], values[name] = pattern, found[number]
    if not patterns:
        raise ValueError(f"model must have weights below the threshold of {threshold}, got none")
    for support in attach(model, patterns, "value"):
        start, learned = support.values, values[support.name].to(support.values)
        start.copy_(learned if scale == 1.0 else torch.lerp(start, learned, scale))
        support.write()
    return model


def _check_values(name: str, wanted: int, found: Any) -> None:
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise TypeError(f"path must hold float tensors, got {type(found).__name__} for {name}")
    if found.shape != (wanted,):
        raise ValueError(
            f"path must hold {wanted} values for {name}, got {list(found.shape)}: is the base "
            "another one than was trained, or of another dtype?"
        )
