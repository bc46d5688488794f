"""When a layer of peft or bitsandbytes can run on our kernels: asked here and nowhere else.

`why_not` is asked at every call, since what it looks at may change at any time: adapters are added,
merged and switched, weights move and are repacked. What lies around a layer is asked once, before
it is swapped (`_obstacles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkern import _check, _native, _select
from peftkern.qlora import placing

# What these lack is better left to the kernels of bitsandbytes and torch than given to references.
SERVED = frozenset(
    device
    for device in _native.KEYS
    if all(_native.serves(op, device) for op in ("qlora_linear", "qlora_linear_bwd"))
)
# What is read of a LoRA layer past its own methods, which take longer than the conditions do.
READ = (
    "_active_adapter", "_disable_adapters", "lora_bias", "lora_variant", "merged_adapters",
    "scaling",
)  # fmt: skip
_kinds: dict[type, str | None] = {}


class Adapter(NamedTuple):
    """One of a LoRA layer's adapters, as a call uses it."""

    name: str
    down: Any  # the module of A
    up: Any  # the module of B
    scale: float
    dropout: float  # 0 in eval
    magnitude: Any = None  # of DoRA, `[out]`


def base_of(layer: nn.Module) -> nn.Module:
    """The layer whose weight is multiplied: inside an adapter of peft, or the layer itself."""
    base = layer._modules.get("base_layer")
    return layer if base is None else base


def kind_of(base: nn.Module) -> str | None:
    """How its weight is stored, told by the forward that the class has."""
    cls = type(base)
    if cls not in _kinds:
        _kinds[cls] = _kind(base)
    return _kinds[cls]


def _kind(base: nn.Module) -> str | None:
    if type(base).forward is nn.Linear.forward:
        return "dense"
    if _select.is_a(base, "bitsandbytes", "Linear4bit"):
        return "4-bit"
    if _select.is_a(base, "bitsandbytes", "Linear8bitLt"):
        return "8-bit"
    for parent in type(base).__mro__:
        if (parent.__module__, parent.__name__) == ("transformers.pytorch_utils", "Conv1D"):
            return "transposed" if type(base).forward is parent.forward else None  # type: ignore[attr-defined]
    return None


def is_dense(base: nn.Module) -> bool:
    """A float weight: `[out, in]`, or `[in, out]` where it is stored transposed."""
    return kind_of(base) in ("dense", "transposed")


def adapters_of(layer: nn.Module, names: Sequence[str] | None = None) -> list[Adapter]:
    """Those that a call uses: the active ones, or those named for the samples of x."""
    inside = vars(layer)
    parts = inside["_modules"]
    if "lora_A" not in parts or inside["_disable_adapters"]:
        return []
    if names is None:
        if inside["merged_adapters"]:
            return []
        active = inside["_active_adapter"]
        names = [active] if isinstance(active, str) else active
    else:
        names = list(dict.fromkeys(names))
    found = []
    for name in names:
        if (down := parts["lora_A"]._modules.get(name)) is not None:
            dropout = parts["lora_dropout"]._modules[name]
            p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
            up, magnitude = parts["lora_B"]._modules[name], None
            if name in inside["lora_variant"] and (own := _magnitude_of(layer, name)) is not None:
                magnitude = own._parameters.get("weight")
                p = p if inside["training"] else 0.0  # DoRA asks the layer, not its dropout
            found.append(Adapter(name, down, up, inside["scaling"][name], p, magnitude))
    return found


def _magnitude_of(layer: nn.Module, name: str) -> nn.Module | None:
    """The module of peft that holds an adapter's magnitude."""
    modules = layer._modules.get("lora_magnitude_vector")
    return None if modules is None else modules._modules.get(name)


def why_not(
    layer: nn.Module, x: Tensor | None = None, names: Sequence[str] | None = None
) -> str | None:
    """Why a call does not run on our kernels but on the forward that the layer had before.

    Args:
        layer: a LoRA layer of peft, or a linear of bitsandbytes.
        x: the call's input; what depends on it is not asked where it is None.
        names: peft's `adapter_names`, one for each sample of x.

    Returns:
        The reason, or None where it runs on our kernels.
    """
    return reason(layer, base_of(layer), adapters_of(layer, names), x, names)


def reason(
    layer: nn.Module, base: nn.Module, adapters: list[Adapter], x: Tensor | None,
    names: Sequence[str] | None,
) -> str | None:  # fmt: skip
    """`why_not` for a caller that has looked up base and adapters."""
    with torch._C.DisableTorchFunctionSubclass():  # which Params4bit would run at every look at it
        found = of_base(base)
        if found is None and base is not layer:
            found = _of_bypass(base) or _of_adapters(layer, base, adapters, names)
        if found is None and x is not None:
            found = _of_input(base, adapters, x, names)
    return found


def of_base(base: nn.Module) -> str | None:
    """Why its weight cannot be read."""
    kind, weight = kind_of(base), base._parameters.get("weight")
    if kind is None:
        return f"{type(base).__name__} is none of nn.Linear, Conv1D, Linear4bit and Linear8bitLt"
    if weight is None:
        return "its weight is computed, not stored"
    if (device := weight.device.type) not in SERVED:
        if device == "meta":
            return "its weight is on the meta device"
        return f"this build has no kernel for {device}"
    if kind == "4-bit":
        return _of_4bit(base, weight)
    if kind == "8-bit":
        return placing.obstacle_8bit(base)
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in _check.FLOATS:
        return f"its weight is {weight.dtype}, not float"
    return None if weight.is_contiguous() else "its weight is not contiguous"


def _of_4bit(base: Any, weight: Any) -> str | None:
    state: Any = getattr(weight, "quant_state", None)
    if found := placing.obstacle_4bit(state):
        return found
    if list(state.shape) != [base.out_features, base.in_features]:
        return "its weight is stored transposed"
    return None


def _of_bypass(module: nn.Module) -> str | None:
    """Why its weight may not be read past its forward, as our kernels do."""
    inside = vars(module)
    if (
        inside["_forward_hooks"] or inside["_forward_pre_hooks"]
        or inside["_backward_hooks"] or inside["_backward_pre_hooks"]
    ):  # fmt: skip
        return f"its inner {type(module).__name__} has hooks"
    if "forward" in inside and not _is_original(module) and not _is_idle(inside.get("_hf_hook")):
        return f"its inner {type(module).__name__} has its forward replaced on the instance"
    return None


def _is_idle(hook: Any) -> bool:
    """A hook of accelerate's that would move x to the device where it is already."""
    return (
        type(hook).__name__ == "AlignDevicesHook" and not hook.offload and not hook.io_same_device
    )


def _is_original(module: nn.Module) -> bool:
    """As accelerate leaves it when it takes a hook away."""
    return is_bound(module, "forward", type(module))


def is_bound(module: nn.Module, attribute: str, cls: type) -> bool:
    method = vars(module).get(attribute)
    return (
        isinstance(method, MethodType)
        and method.__self__ is module
        and method.__func__ is cls.forward  # type: ignore[attr-defined]
    )


def _of_adapters(
    layer: nn.Module, base: nn.Module, adapters: list[Adapter], names: Sequence[str] | None
) -> str | None:
    inside = vars(layer)
    if inside["merged_adapters"] and (inside["_disable_adapters"] or names is not None):
        return "its adapters are merged, which peft looks after"
    if not adapters and is_dense(base):
        return "no adapter is at work, and its base alone is torch's own linear"
    for adapter in adapters:
        if found := _of_adapter(layer, adapter):
            return found
    if len(adapters) > 1 or names is not None:
        # Several would share one mask of x, where peft draws one for each.
        if any(adapter.dropout for adapter in adapters):
            return "several adapters with dropout at once"
        if names is not None and len({adapter.up.in_features for adapter in adapters}) > 1:
            return "adapters of several ranks in one batch"
        if names is not None and kind_of(base) == "transposed":
            return "a batch of several adapters on a weight that is stored transposed"
    return _of_magnitudes(layer, base, adapters, names)


def _of_magnitudes(
    layer: nn.Module, base: nn.Module, adapters: list[Adapter], names: Sequence[str] | None
) -> str | None:
    for name, *_, magnitude in adapters:
        if magnitude is None:
            continue
        if names is not None:
            return "peft refuses DoRA in a batch of several adapters"
        own: Any = _magnitude_of(layer, name)
        if found := _of_bypass(own):
            return found
        if type(magnitude) is not nn.Parameter or not magnitude.is_contiguous():
            return f"the magnitude of its adapter {name} is not a plain tensor"
        if own.fan_in_fan_out != (kind_of(base) == "transposed"):
            return f"its adapter {name} takes a weight for transposed that is not, or the reverse"
        dropout = layer._modules["lora_dropout"]._modules[name]  # type: ignore[union-attr]
        # Then peft starts from the base alone, and not from what the adapters before have given.
        if len(adapters) > 1 and layer.training and type(dropout) is nn.Dropout:
            return "several adapters, one of them DoRA with dropout"
    return None


def _of_adapter(layer: nn.Module, adapter: Adapter) -> str | None:
    inside, name = vars(layer), adapter.name
    if name in inside["lora_variant"]:
        kind = type(inside["lora_variant"][name]).__name__
        if kind != "DoraLinearVariant" or adapter.magnitude is None:
            return f"its adapter {name} is {kind.removesuffix('LinearVariant')}"
    if inside["lora_bias"].get(name):
        return f"its adapter {name} has a bias (lora_bias)"
    if type(inside["_modules"]["lora_dropout"]._modules[name]) not in (nn.Dropout, nn.Identity):
        return f"its adapter {name} has a dropout of its own"
    for module in (adapter.down, adapter.up):
        if found := _of_bypass(module):
            return found
        weight = module._parameters.get("weight")
        if type(module) is not nn.Linear or type(weight) is not nn.Parameter:
            return f"its adapter {name} is not of plain linears"
        if not weight.is_contiguous():
            return f"its adapter {name} is not contiguous"
    return None


def _of_input(
    base: Any, adapters: list[Adapter], x: Tensor, names: Sequence[str] | None
) -> str | None:
    weight, device = base._parameters["weight"], x.device
    if torch._C._are_functorch_transforms_active():
        return "torch.func calls it, which our gradient does not know"
    if x.dtype not in _check.FLOATS:
        return f"its input is {x.dtype}, not float"
    columns = base.nx if kind_of(base) == "transposed" else base.in_features
    if x.dim() == 0 or x.shape[-1] != columns:
        return "its input has another width"
    parts = [part for adapter in adapters for part in (adapter.down, adapter.up)]
    magnitudes = [one.magnitude for one in adapters if one.magnitude is not None]
    for tensor in (weight, *(part._parameters["weight"] for part in parts), *magnitudes):
        if tensor.device != device:
            return f"its input is on {device}, a weight on {tensor.device}"
    if x.dtype != weight.dtype and is_dense(base):
        if not torch.is_autocast_enabled(device.type):
            return f"its input is {x.dtype}, its weight {weight.dtype}"
    if names is not None and (x.dim() < 2 or len(names) != len(x)):
        return "adapter_names must name an adapter for each sample"
    return None
