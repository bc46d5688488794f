"""Sparse adapters as differences P - P0 from the base: scaled, and added to each other."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from peftkern import _check, _folder
from peftkern.sparse import stored
from peftkern.sparse.config import SparseConfig
from peftkern.sparse.described import Described
from peftkern.sparse.pattern import Pattern
from peftkern.sparse.placing import none_of
from peftkern.sparse.state import common, take, union
from peftkern.sparse.support import Support, attach, supports


@torch.no_grad()
def scale_(model: nn.Module, factor: float) -> None:
    """P = P0 + factor * (P - P0), in place: SaRA (Hu et al., 2024) goes from 0 to 2.

    Entries that have trained and no longer do train again: there is no other place for their new
    values.

    Args:
        model: with supports.
        factor: a finite number.

    Raises:
        ValueError: another factor, or a model without supports, or merged.
    """
    if not math.isfinite(factor):
        raise ValueError(f"factor must be finite, got {factor}")
    for support in _unmerged(model):
        support.replace(support.state.origin)
        start = _start(support)
        moved = start + factor * (support.values - start)
        support.values.copy_(moved)
        support.write()


@torch.no_grad()
def add_(model: nn.Module, path: str | os.PathLike[str], factor: float = 1.0) -> None:
    """P = P + factor * (P' - P0), in place, where P' is what an adapter in a file makes of P0.

    Afterwards all entries of both train. The file's form may be another one than the model's.

    Args:
        model: with or without supports; those that the file has and the model lacks are put in.
        path: a folder that `save_adapter` has written, of sparse adapters alone.
        factor: a finite number.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        TypeError, ValueError: a file is corrupt, belongs to another base or holds another method;
            another factor; a model that is merged, or lacks what the file names.
    """
    if not math.isfinite(factor):
        raise ValueError(f"factor must be finite, got {factor}")
    found = _read(model, Path(path))
    here = {support.name: support for support in _unmerged(model, some=False)}
    missing = {n: none_of(model.get_parameter(n)) for n in found if n not in here}
    here |= {support.name: support for support in attach(model, missing)}
    for name, (pattern, values, form) in found.items():
        support = here[name]
        pattern, values = pattern.to(support.values.device), values.to(support.values.device)
        support.replace(union(support.state.origin, pattern))
        _, places = common(pattern, support.pattern)
        change = values - _base(support)[places] if form == "value" else values
        support.values[places] += factor * change
        support.write()


def _unmerged(model: nn.Module, some: bool = True) -> list[Support]:
    found = supports(model)
    if some and not found:
        raise ValueError("model must have a support (SparseConfig or SaraAdamW), got none")
    if merged := [support.name for support in found if _home(support).merged]:
        raise ValueError(f"model must be unmerged, got merged {_check.listed(merged)}")
    return found


def _home(support: Support) -> Described:
    assert isinstance(support.module, Described)
    return support.module


def _start(support: Support) -> Tensor:
    """What the values were before any training; the pattern is all of the origin."""
    state, values = support.state, support.values.detach()
    if state.base is None:
        return torch.zeros_like(values)
    return state.base.to(values.dtype)


def _base(support: Support) -> Tensor:
    """What the weight was before any training; the pattern is all of the origin."""
    if support.form == "value":
        return _start(support)
    return take(support.weight, support.pattern).to(support.values.dtype)


def _read(model: nn.Module, path: Path) -> dict[str, tuple[Pattern, Tensor, str]]:
    """Pattern, values and form of every parameter that a file names."""
    from peftkern import _own  # which needs this package

    content, tensors = _folder.read(path)
    if content.get("peft_type") != _own.PEFT_TYPE:
        raise ValueError(f"peft_type must be {_own.PEFT_TYPE!r}, got {content.get('peft_type')!r}")
    file = _own.read(content, tensors)
    modules = dict(model.named_modules())
    found = {}
    for name, parts in file.parts.items():
        config = file.own[name]
        if not isinstance(config, SparseConfig):
            raise ValueError(f"{name} must be a sparse adapter, got one of {config.method}")
        if (module := modules.get(name)) is None:
            raise ValueError(f"model must have what the file names, got no {name}")
        own = sorted({key.rpartition(".")[0] for key in parts})
        if unknown := [key for key in own if module._parameters.get(key) is None]:
            raise ValueError(f"{name} must have what the file names, got no {', '.join(unknown)}")
        for key in own:
            shape, base_hash = _facts(module, key)
            stored.check(name, parts, file.bases.get(name), {key: shape}, {key: base_hash})
            title = f"{name}.{key}".lstrip(".")
            found[title] = (*stored.unpacked(key, parts, shape), config.form)
    return found


def _facts(module: nn.Module, key: str) -> tuple[Sequence[int], str]:
    """The shape and the base's hash of a parameter, adapted or not."""
    if isinstance(module, Described) and (hashes := module.base_hash() or {}).get(key):
        return module.shape_of(key), hashes[key]
    weight = module._parameters[key]
    assert weight is not None
    return weight.shape, stored.base_hash(weight)
