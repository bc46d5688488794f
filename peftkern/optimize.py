"""Puts our kernels under the layers that peft and bitsandbytes have made, and takes them out."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

from torch import nn

from peftkern import _select, _siblings, _swapped
from peftkern._conditions import why_not
from peftkern._obstacles import is_candidate, obstacle
from peftkern.adapt import Skipped
from peftkern.report import Report, report


def optimize(model: Any) -> Report:
    """Runs the LoRA layers of peft and the linears of bitsandbytes on our kernels.

    In place: the class of each becomes a subclass that overrides `forward` alone, so parameters,
    names, hooks, `state_dict`, merging and saving stay what they were. A call that our kernels do
    not serve (a bias of the adapter, aLoRA, …) runs the forward that was there before; `explain`
    tells why. Layers that peft puts in later take another call of `optimize`.

    What differs: dropout draws from our generator, so it drops other elements at the same rate
    (that of DoRA peft draws itself); a row of DoRA whose norm is 0 stays 0, where peft's is NaN;
    4-bit weights have the one value that peftkern gives them everywhere, in eval mode on a CPU
    too; a second derivative is refused; and a model that is pickled whole asks for peftkern when
    it is loaded, unless it was restored.

    Args:
        model: an `nn.Module`, or a pipeline of diffusers, whose components are taken one by one.

    Returns:
        A `Report`: a row for each layer that runs on our kernels as it is now. `skipped` has every
        other layer of peft and bitsandbytes with the reason, those swapped by an earlier call, and
        where there is no such layer, every linear.

    Raises:
        TypeError: `model` is something else.
    """
    reports = {prefix: _optimize(root) for prefix, root in _roots(model).items()}
    rows, skipped = [], []
    for prefix, one in reports.items():
        rows += [replace(row, name=_joined(prefix, row.name)) for row in one.rows]
        skipped += [replace(s, name=_joined(prefix, s.name)) for s in one.skipped]
    parameters = sum(one.parameters for one in reports.values())
    shared = [
        tuple(_joined(prefix, name) for name in names)
        for prefix, one in reports.items()
        for names in one.shared
    ]
    return Report(rows, skipped, parameters, shared)


def restore(model: Any) -> None:
    """Undoes `optimize` and `register`: every layer has the class again that it came with.

    Args:
        model: what `optimize` was given, or a part of it.

    Raises:
        TypeError: neither an `nn.Module` nor a pipeline of diffusers.
    """
    for root in _roots(model).values():
        for layer in root.modules():
            if isinstance(layer, _swapped.Swapped):
                _swapped.swap(layer, _swapped.original(layer))


def register(config: Any) -> None:
    """Makes the LoRA layers that peft puts in from this config on run on our kernels.

    As `optimize`, from `get_peft_model` on: `peftkern.register(config)` comes before it. Names and
    files are peft's, and say nothing of it: an adapter that was trained so loads without peftkern,
    and to have our kernels again, `PeftModel.from_pretrained(..., config=config)` takes a config
    that was registered.

    Args:
        config: peft's `LoraConfig`; changed in place.

    Raises:
        TypeError: `config` is something else.
    """
    kind = type(config)
    if kind.__name__ != "LoraConfig" or kind.__module__.split(".")[0] != "peft":
        raise TypeError(f"config must be a LoraConfig of peft, got {kind.__name__}")
    conv1d = import_module("transformers.pytorch_utils").Conv1D  # which peft needs itself
    config._register_custom_module(dict.fromkeys((nn.Linear, conv1d), _swapped.made_for_peft))


def _roots(model: Any) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module):
        return {"": model}
    components = getattr(model, "components", None)  # of a pipeline
    if not isinstance(components, dict):
        name = type(model).__name__
        raise TypeError(f"model must be an nn.Module or a pipeline of diffusers, got {name}")
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _joined(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def _optimize(root: nn.Module) -> Report:
    places = {root: [""], **_select.names(root)}
    inside = _inside_adapters(root)
    planned: dict[nn.Module, type[nn.Module]] = {}
    skipped = []
    for layer, names in places.items():
        if layer in inside or not is_candidate(layer):
            continue
        if isinstance(layer, _swapped.Swapped):
            if why_not(layer) is None:  # otherwise `report` tells of it
                skipped.append(Skipped(names[0], "optimized already"))
        elif (cls := _swapped.stand_in(layer)) is None:
            title = _swapped.title(layer)
            skipped.append(Skipped(names[0], f"peftkern has no kernel for {title}"))
        elif reason := obstacle(root, layer, [name for name in names if name]):
            skipped.append(Skipped(names[0], reason))
        else:
            planned[layer] = cls
    for layer, cls in planned.items():
        _swapped.swap(layer, cls)
    _siblings.connect(root)
    result = report(root)
    if not (result.rows or result.skipped or skipped):
        reason = "neither adapted by peft nor quantised by bitsandbytes"
        skipped = [Skipped(n[0], reason) for m, n in places.items() if _select.is_linear(m)]
    return replace(result, skipped=[*result.skipped, *skipped])


def _inside_adapters(root: nn.Module) -> set[nn.Module]:
    """Their base is theirs to run, and their own parts are no layers of the model."""
    inside: set[nn.Module] = set()
    for module in root.modules():
        if _select.is_a(module, "peft", "BaseTunerLayer"):
            inside |= set(module.modules()) - {module}
    return inside
