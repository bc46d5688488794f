"""Which kernel a layer runs, and why not a faster one."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftkern import _conditions, _native, _obstacles, _swapped
from peftkern._attached import Attached
from peftkern._family import Adapter, Explained
from peftkern.qlora import described


def explain(layer: nn.Module) -> str:
    """Which kernel this layer runs on its device, and why not the faster one.

    Args:
        layer: any module; in a model, what `get_submodule` gives for the name in a report.

    Returns:
        A few lines: what the layer is, whose forward it runs and why, and where that is ours, the
        ops with the kernel that serves each on the weight's device.

    Raises:
        TypeError: `layer` is no module.
    """
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be an nn.Module, got {type(layer).__name__}")
    title = _swapped.title(layer)
    if isinstance(layer, Adapter):
        told = layer.explained()
    elif (reason := _reason(layer)) is not None:
        return f"{title}\nruns      its own forward: {reason}"
    else:
        told = _of_swapped(layer)
    lines = [f"{title}, {told.holds} on {told.device}", f"runs      {told.runs}"]
    for name, op in told.ops.items():
        lines.append(f"{name:9} {op}: {_kernel(op, told.device)}")
    served = all(_native.serves(op, told.device) for op in told.ops.values())
    if told.paths is not None and told.device in _native.GPUS and served:
        lines.append(f"paths     {told.paths()}")
    return "\n".join(lines)


def _reason(layer: nn.Module) -> str | None:
    """Why the layer's own forward runs; None where ours does."""
    if isinstance(layer, _swapped.Swapped):
        return _conditions.why_not(layer)
    if isinstance(layer, Attached):
        slots = [name for name, child in layer.named_children() if isinstance(child, Adapter)]
        if not slots:
            return "its input is read by the adapter of another module"
        return f"what it gives goes through its {' and '.join(slots)}, to be explained by that name"
    if not _obstacles.is_candidate(layer):
        return "neither adapted by peft nor quantised by bitsandbytes"
    if _swapped.stand_in(layer) is None:
        return f"peftkern has no kernel for {_swapped.title(layer)}"
    reason = _obstacles.obstacle(layer, layer, []) or _conditions.why_not(layer)
    return reason or "not optimized yet (peftkern.optimize does it)"


def _of_swapped(layer: Any) -> Explained:
    weight = _swapped.weight_of(_conditions.base_of(layer))
    return described.of_weight(weight, _terms(layer))


def _terms(layer: Any) -> str:
    adapters = _conditions.adapters_of(layer)
    if not adapters:
        return "base alone"
    ranks = ", ".join(f"{one.name} of rank {one.down.out_features}" for one in adapters)
    text = f"base and adapter{'s' * (len(adapters) > 1)} {ranks} in"
    with_dora = [one for one in adapters if one.magnitude is not None]
    if not with_dora:
        return f"{text} one pass"
    # Of what its dropout leaves of x, and of what it takes.
    passes = "two passes" if with_dora[-1].dropout else "one pass"
    names = " of " + ", ".join(one.name for one in with_dora) if len(adapters) > 1 else ""
    return f"{text} {passes}, then a factor for each row (DoRA{names})"


def _kernel(op: str, device: str) -> str:
    kernel = _native.kernels()[op].get(device, "reference")
    if kernel == "reference":
        return f"plain torch, since this build has no kernel for {device}"
    if kernel != "C++":
        return kernel
    isa, best = _native.isa(), _native.available_isas()[-1]
    slower = "" if isa == best else f", since it was chosen; {best} is there"
    return f"C++ ({isa}{slower})"
