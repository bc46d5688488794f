"""Merges the adapters of a model into its weights, and takes them out again."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from peftkern import _select
from peftkern.adapt import adapters
from peftkern.qlora import QLoRALinear, merging

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model, dtype: torch.dtype | None = None, requantize: bool = False) -> Model:
    """W becomes W + scaling * B A in every adapted layer, which then costs what a plain one costs.

    In place, and all or nothing. The sum is made in float32 (float64 where the weight is) and
    rounded once. The originals are kept for `unmerge`, so the model holds both; a weight that
    another module shares stays as it is there. While it computes, at most a few panels of 16 MB
    are dense beside what is kept.

    A quantised base has no room for a small change D: stored again in 4 bits, W + D is nearly W
    where D is below 2 % of it. So it is merged only where one says into what: `dtype`, or
    `requantize`, which warns with the relative error of the change, as measured. W is the weight
    that the adapter was trained on, the quantised one, not that from which it was quantised. A
    layer with `merge_aware` sees the requantised weight anyway: it merges as it is, and loses
    nothing.

    Merged, `state_dict` is that of the plain model with merged weights, `save_adapter` saves the
    adapter as ever, and training and loading are refused.

    Args:
        model: adapted.
        dtype: float32, bfloat16, float16 or float64, of the merged weights; None keeps that of a
            float base.
        requantize: store the merged weight of a quantised base in its format again.

    Returns:
        The same model.

    Raises:
        TypeError: `dtype` is not float.
        ValueError: a quantised base and neither `dtype` nor `requantize`, or both; a layer that is
            merged already or would not be finite; no adapter, or one of peft's.
    """
    layers = _layers(model)
    for name, layer in layers.items():
        merging.refuse(name, layer, dtype, requantize)
    merged = {n: merging.merged(n, layer, dtype, requantize) for n, layer in layers.items()}
    merging.warn({name: m.loss for name, m in merged.items() if m.loss is not None})
    for name, layer in layers.items():
        merging.take(layer, merged[name])
    return model


def unmerge(model: Model) -> Model:
    """Puts back what `merge` has replaced: the very parameters, with their bits.

    Args:
        model: with merged layers; others stay as they are.

    Returns:
        The same model.

    Raises:
        ValueError: no layer is merged.
    """
    merged = {name: layer for name, layer in _layers(model).items() if layer.merged}
    if not merged:
        raise ValueError("model must be merged, got no merged layer")
    for name, layer in merged.items():
        merging.give_back(name, layer)
    return model


def _layers(model: nn.Module) -> dict[str, QLoRALinear]:
    theirs = [n for n, m in model.named_modules() if _select.is_a(m, "peft", "BaseTunerLayer")]
    if theirs:
        raise ValueError(
            "model must have no adapters of peft, whose own merge_adapter() and unmerge_adapter() "
            f"serve them, got {theirs[0]} and {len(theirs) - 1} more"
        )
    if not (layers := adapters(model)):
        raise ValueError("model must have an adapter (peftkern.adapt puts one in), got none")
    return layers
