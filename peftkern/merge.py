"""Merges the adapters of a model into its weights, and takes them out again."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from peftkern import _select
from peftkern._family import Adapter, InPlace, adapters
from peftkern.adapt import parents
from peftkern.qlora import QuantizedWeight, bnb, merging
from peftkern.qlora.adapter import LinearAdapter
from peftkern.qlora.frozen import FrozenLinear
from peftkern.qlora.placing import keep_hooks

Model = TypeVar("Model", bound=nn.Module)


def merge(
    model: Model,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
    unload: bool = False,
) -> Model:
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

    Adapters that train a model's own weights are there already: of their form "value" nothing is
    computed and nothing stored, of "delta" a sum on the entries that trained. `unmerge` puts back
    what the weights were before; what they have learned is written again by the next forward.

    With `unload` (peft's `merge_and_unload`) nothing stays but the merged weights: a plain
    `nn.Linear` stands where each layer was, or a frozen linear of the packed bytes. There is no way
    back, and no more than one weight is ever there twice; for that each is computed twice, the
    first time to see that all can be merged.

    Args:
        model: adapted.
        dtype: float32, bfloat16, float16 or float64, of the merged weights; None keeps that of a
            float base.
        requantize: store the merged weight of a quantised base in its format again.
        unload: give up adapters and originals.

    Returns:
        The same model.

    Raises:
        TypeError: `dtype` is not float.
        ValueError: a quantised base and neither `dtype` nor `requantize`, or both; a layer that is
            merged already or would not be finite; one to unload that is the model itself, or whose
            forward is replaced on the instance; no adapter, one that is not linear in its input, or
            one of peft's.
    """
    layers, in_place = _layers(model)
    for name, place in in_place.items():
        place.refuse_merge(name, dtype, requantize)
    for name, layer in layers.items():
        merging.refuse(name, layer, dtype, requantize)
        if unload:
            _refuse_unloading(model, name, layer)
    if unload:  # of each weight its loss alone is kept here
        losses = {n: merging.merged(n, m, dtype, requantize).loss for n, m in layers.items()}
        merging.warn({name: loss for name, loss in losses.items() if loss is not None})
        _unload(model, layers, in_place, dtype, requantize)
        return model
    merged = {n: merging.merged(n, layer, dtype, requantize) for n, layer in layers.items()}
    merging.warn({name: m.loss for name, m in merged.items() if m.loss is not None})
    for name, layer in layers.items():
        merging.take(layer, merged[name])
    for place in in_place.values():
        place.merge_in_place()
    return model


def _refuse_unloading(model: nn.Module, name: str, layer: LinearAdapter) -> None:
    if layer is model:
        raise ValueError(
            f"model must hold the layers that are unloaded, got a {type(layer).__name__} itself"
        )
    if "forward" in vars(layer):
        raise ValueError(
            f"{name} must have the forward of its class to be unloaded, got one on the instance, "
            "as hooks of accelerate put it there"
        )


def _unload(
    model: nn.Module,
    layers: dict[str, LinearAdapter],
    in_place: dict[str, InPlace],
    dtype: torch.dtype | None,
    requantize: bool,
) -> None:
    places = parents(model)
    for place in in_place.values():
        place.merge_in_place()
    for place in in_place.values():
        place.unload()
    while layers:
        name = next(iter(layers))
        layer = layers.pop(name)
        plain = _plain(layer, merging.merged(name, layer, dtype, requantize).weight)
        for parent, attribute in places[id(layer)]:
            parent._modules[attribute] = plain
    vars(model).pop("_peftkern_skipped", None)
    if not any(map(_is_quantized, model.modules())):
        for module in model.modules():
            _forget_quantization(module)


def _is_quantized(module: nn.Module) -> bool:
    if isinstance(module, FrozenLinear):
        return module.quantized_weight is not None
    return bnb.is_quantized(module)


def _forget_quantization(module: nn.Module) -> None:
    """Takes off what transformers has noted, who would refuse to cast the model, and save it as
    bitsandbytes' or GGUF's.
    """
    if (quantizer := getattr(module, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(module)
        for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            vars(module).pop(mark, None)


def _plain(layer: LinearAdapter, weight: QuantizedWeight | Tensor) -> nn.Module:
    """What stands in the layer's place once its adapter is in the weight."""
    if isinstance(weight, QuantizedWeight):
        plain: nn.Module = FrozenLinear(weight, layer.bias)
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias  # type: ignore[assignment]
    keep_hooks(layer, plain)
    return plain.train(layer.training)


def unmerge(model: Model) -> Model:
    """Puts back what `merge` has replaced: the very parameters, with their bits.

    Args:
        model: with merged layers; others stay as they are.

    Returns:
        The same model.

    Raises:
        ValueError: no layer is merged.
    """
    found = _adapters(model)
    merged = {n: m for n, m in found.items() if isinstance(m, LinearAdapter | InPlace) and m.merged}
    if not merged:
        raise ValueError("model must be merged, got no merged layer")
    for name, layer in merged.items():
        if isinstance(layer, LinearAdapter):
            merging.give_back(name, layer)
        else:
            layer.unmerge_in_place()
    return model


def _layers(model: nn.Module) -> tuple[dict[str, LinearAdapter], dict[str, InPlace]]:
    """Those that get another weight, and those whose own weights change."""
    linear: dict[str, LinearAdapter] = {}
    in_place: dict[str, InPlace] = {}
    for name, layer in _adapters(model).items():
        if (reason := layer.merge_obstacle()) is not None:
            kind = type(layer).__name__
            raise ValueError(f"{name} must have a place in a weight to merge, got {kind}: {reason}")
        if isinstance(layer, LinearAdapter):
            linear[name] = layer
        else:
            assert isinstance(layer, InPlace)
            in_place[name] = layer
    return linear, in_place


def _adapters(model: nn.Module) -> dict[str, Adapter]:
    theirs = [n for n, m in model.named_modules() if _select.is_a(m, "peft", "BaseTunerLayer")]
    if theirs:
        raise ValueError(
            "model must have no adapters of peft, whose own merge_adapter() and unmerge_adapter() "
            f"serve them, got {theirs[0]} and {len(theirs) - 1} more"
        )
    if not (layers := adapters(model)):
        raise ValueError("model must have an adapter (peftkern.adapt puts one in), got none")
    return layers
