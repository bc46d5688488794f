"""Why a layer of peft or bitsandbytes is not swapped: asked once, of what lies around it too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from peftkern import _conditions, _select


def is_candidate(layer: nn.Module) -> bool:
    """What `optimize` swaps, or says why not."""
    return _select.is_a(layer, "peft", "BaseTunerLayer") or _conditions.kind_of(layer) in (
        "4-bit",
        "8-bit",
    )


def obstacle(model: nn.Module, layer: nn.Module, places: list[str]) -> str | None:
    """Why this layer is not swapped at all; None where it is."""
    if reason := _select.closed(model, places) or _of_parents(model, places):
        return reason
    inside = vars(layer)
    if "lora_A" in inside["_modules"] and not all(name in inside for name in _conditions.READ):
        return "this release of peft keeps its adapters in another way"
    if "forward" in inside and not any(
        _conditions.is_bound(layer, attribute, type(layer))
        for attribute in ("forward", "_old_forward")
    ):
        return "its forward is replaced on the instance"
    base = _conditions.base_of(layer)
    if any(vars(module).get("_hf_tp_plan") is not None for module in (layer, base)):
        return "it is tensor-parallel"
    for module in layer.modules():
        if any(getattr(hook, "offload", False) for hook in _hooks(vars(module).get("_hf_hook"))):
            return "accelerate offloads its weight between calls"
    return _conditions.of_base(base)


def _hooks(hook: Any) -> Iterator[Any]:
    """A hook of accelerate's, or those in a sequence of them."""
    for inner in getattr(hook, "hooks", ()):
        yield from _hooks(inner)
    yield hook


def _of_parents(model: nn.Module, places: list[str]) -> str | None:
    """Unsloth's functions read the weights of a block's linears and never call them."""
    for name in places:
        parts = name.split(".")
        for depth in range(len(parts)):
            parent = model.get_submodule(".".join(parts[:depth]))
            for function in (type(parent).forward, *vars(parent).values()):
                module = str(getattr(function, "__module__", None))
                if callable(function) and module.startswith("unsloth"):
                    return "unsloth has patched what is around it, to read its weight uncalled"
    return None
