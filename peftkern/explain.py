"""Which kernel a layer runs, and why not a faster one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftkern import _conditions, _native, _obstacles, _swapped
from peftkern.qlora import QLoRALinear, QuantizedWeight


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
    if (reason := _reason(layer)) is not None:
        return f"{title}\nruns      its own forward: {reason}"
    weight = _weight(layer)
    device = weight.device.type
    lines = [f"{title}, {_text(weight)} on {device}", f"runs      peftkern.qlora, {_terms(layer)}"]
    for name, op in (("forward", "qlora_linear"), ("backward", "qlora_linear_bwd")):
        lines.append(f"{name:9} {op}: {_kernel(op, device)}")
    if device in _native.GPUS and _native.serves("qlora_linear", device):
        lines.append(f"paths     {_paths(weight)}")
    return "\n".join(lines)


def _reason(layer: nn.Module) -> str | None:
    """Why the layer's own forward runs; None where ours does."""
    if isinstance(layer, QLoRALinear):
        return None
    if isinstance(layer, _swapped.Swapped):
        return _conditions.why_not(layer)
    if not _obstacles.is_candidate(layer):
        return "neither adapted by peft nor quantised by bitsandbytes"
    if _swapped.stand_in(layer) is None:
        return f"peftkern has no kernel for {_swapped.title(layer)}"
    reason = _obstacles.obstacle(layer, layer, []) or _conditions.why_not(layer)
    return reason or "not optimized yet (peftkern.optimize does it)"


def _weight(layer: Any) -> Tensor | QuantizedWeight:
    if isinstance(layer, QLoRALinear):
        return layer.quantized_weight or layer.weight
    return _swapped.weight_of(_conditions.base_of(layer))


def _text(weight: Tensor | QuantizedWeight) -> str:
    rows, columns = weight.shape
    if isinstance(weight, Tensor):
        return f"{rows} x {columns} in {str(weight.dtype).removeprefix('torch.')}"
    size = weight.block_size
    blocks = f"blocks of {size}" + ", nested scales" * weight.nested if size else "a scale a row"
    return f"{rows} x {columns} in {weight.format.name}, {blocks},"


def _terms(layer: Any) -> str:
    if isinstance(layer, QLoRALinear):
        return _terms_of_ours(layer)
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


def _terms_of_ours(layer: QLoRALinear) -> str:
    if layer.merged:
        return "the merged weight alone"
    if layer.merge_aware:
        return f"the weight that merging its adapter of rank {layer.r} would store"
    rows = ", then a factor for each row (DoRA)" * layer.use_dora
    return f"base and adapter of rank {layer.r} in one pass{rows}"


def _kernel(op: str, device: str) -> str:
    kernel = _native.kernels()[op].get(device, "reference")
    if kernel == "reference":
        return f"plain torch, since this build has no kernel for {device}"
    if kernel != "C++":
        return kernel
    isa, best = _native.isa(), _native.available_isas()[-1]
    slower = "" if isa == best else f", since it was chosen; {best} is there"
    return f"C++ ({isa}{slower})"


def _paths(weight: Tensor | QuantizedWeight) -> str:
    """Of a GPU: what the number of rows decides, and by whose measurement."""
    from peftkern.kernels import qlora_paths  # of use on GPUs alone

    bits = 0 if isinstance(weight, Tensor) else weight.format.bits
    decodes = _native.serves("qlora_decode", weight.device.type)
    return qlora_paths.describe(weight.device, weight.dtype, bits, decodes)
