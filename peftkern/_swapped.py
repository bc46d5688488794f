"""The classes that `optimize` swaps in: those of peft and bitsandbytes, with a forward of ours.

Each is made when it is first asked for, as an attribute of this module, since the library that it
comes from need not be installed; pickle finds it by the same name.
"""

from __future__ import annotations

from importlib import import_module
from operator import is_not
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import _attached, _conditions, _products
from peftkern.qlora import QuantizedWeight
from peftkern.qlora.sharing import SharedInput
from peftkern.qlora.siblings import Sibling

# Our name, and the class that it stands in for. A class of another forward is not here.
ORIGINALS = {
    "LoraLinear": ("peft.tuners.lora.layer", "Linear"),
    "LoraLinear4bit": ("peft.tuners.lora.bnb", "Linear4bit"),
    "LoraLinear8bitLt": ("peft.tuners.lora.bnb", "Linear8bitLt"),
    "Linear4bit": ("bitsandbytes.nn.modules", "Linear4bit"),
    "LinearNF4": ("bitsandbytes.nn.modules", "LinearNF4"),
    "LinearFP4": ("bitsandbytes.nn.modules", "LinearFP4"),
    "Linear8bitLt": ("bitsandbytes.nn.modules", "Linear8bitLt"),
}
CACHE = "_peftkern_weight"  # the attribute of a layer that holds its `Cache`


class Swapped(nn.Module):
    """What all of them are: a subclass that overrides forward alone."""


class Lora(Swapped):
    """A LoRA layer of peft: its base and its adapters in one pass."""

    shared_input: SharedInput | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.shared_input is not None and not args and not kwargs:
            if (y := self.shared_input.forward(self, x)) is not None:
                dense = _conditions.kind_of(_conditions.base_of(self)) == "dense"
                return y if dense else y.to(x.dtype)
        if not args and (not kwargs or kwargs.keys() == {"adapter_names"}):
            names, base = kwargs.get("adapter_names"), _conditions.base_of(self)
            adapters = _conditions.adapters_of(self, names)
            if _conditions.reason(self, base, adapters, x, names) is None:
                return _products.adapted(self, base, _weight(self, base), adapters, x, names)
        _forget(self)
        return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]

    def operands(self, x: Tensor) -> tuple[Sibling, float] | None:
        """As `QLoRALinear.operands`, where one adapter is at work and computes in x's dtype."""
        base = _conditions.base_of(self)
        adapters = _conditions.adapters_of(self)
        if len(adapters) != 1 or _conditions.reason(self, base, adapters, x, None) is not None:
            return None
        weight, (one,) = _weight(self, base), adapters
        if isinstance(weight, Tensor) and (weight.requires_grad or not weight.is_contiguous()):
            return None
        if one.magnitude is not None or _products.in_compute_dtype(base, x) is not x:
            return None
        factors = one.down.weight, one.up.weight
        return Sibling(weight, base._parameters["bias"], *factors, one.scale), one.dropout

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.shared_input is not None:
            self.shared_input.join(self)


class Quantized(Swapped):
    """A linear of bitsandbytes that stands alone."""

    def forward(self, x: Tensor) -> Tensor:
        if _conditions.why_not(self, x) is None:
            return _products.adapted(self, self, _weight(self, self), [], x, None)
        _forget(self)
        return super().forward(x)  # type: ignore[no-any-return]


class Cache:
    """The quantised weight of a layer as its forward read it last: never copied, never pickled.

    It holds the packed bytes, so a forward that is not ours lets go of it: weights that are sharded
    or moved away are to be freed.
    """

    __slots__ = ("parts", "pointer", "weight")

    def __init__(self) -> None:
        self.pointer: int | None = None
        self.parts: tuple[object, ...] = ()

    def current(self, base: Any) -> Tensor | QuantizedWeight:
        """Read anew where the weight has moved, was repacked or replaced since the last call."""
        params = base._parameters["weight"]
        if (state := getattr(params, "quant_state", None)) is not None:
            parts = (state, state.absmax)
        else:
            parts = (params.SCB, base.state.SCB)
        with torch._C.DisableTorchFunctionSubclass():
            pointer = params.data_ptr()
        if self.pointer != pointer or any(map(is_not, parts, self.parts)):
            self.weight, self.parts, self.pointer = weight_of(base), parts, pointer
        return self.weight

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()


def __getattr__(name: str) -> Any:
    if name not in ORIGINALS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = ORIGINALS[name]
    parent = getattr(import_module(module), original)
    ours = Lora if name.startswith("Lora") else Quantized
    cls = type(name, (ours, parent), {"__module__": __name__, "__doc__": ours.__doc__})
    globals()[name] = cls
    return cls


def stand_in(layer: nn.Module) -> type[nn.Module] | None:
    """Our class for a layer of exactly a class that we know."""
    cls = type(layer)
    for name, (module, original) in ORIGINALS.items():
        # One that adapters are attached to has its name alone.
        same = (cls.__module__, cls.__name__) == (module, original)
        if same and not issubclass(cls, _attached.Attached):
            return getattr(import_module(__name__), name)  # type: ignore[no-any-return]
    return None


def title(layer: nn.Module) -> str:
    """Its class as users call it: lora.Linear, bitsandbytes.Linear4bit, nn.Linear."""
    cls = original(layer) if isinstance(layer, Swapped) else type(layer)
    package, *inner = cls.__module__.split(".")
    if package == "peft" and len(inner) > 1:
        package = inner[1]
    return f"{'nn' if package == 'torch' else package}.{cls.__name__}"


def original(layer: nn.Module) -> type[nn.Module]:
    """The class that a swapped layer had, whatever is attached to it since."""
    return _attached.original(type(layer)).__bases__[1]


def made_for_peft(
    target: nn.Module, adapter_name: str, config: Any, **options: Any
) -> nn.Module | None:
    """What peft puts around `target`, of a registered config; None where it is to choose itself."""
    kind = _conditions.kind_of(target)
    if kind == "transposed":  # peft sets the config right, with a warning, where it has to
        dispatch = import_module("peft.tuners.lora.layer").dispatch_default
        layer = dispatch(target, adapter_name, config=config, **options)
        if layer is not None and (cls := stand_in(layer)) is not None:
            swap(layer, cls)
        return layer  # type: ignore[no-any-return]
    if kind == "dense":
        plain = type(target) is nn.Linear and type(target.weight) is nn.Parameter
        name = None if not plain or config.fan_in_fan_out else "LoraLinear"
    else:
        name = {"4-bit": "LoraLinear4bit", "8-bit": "LoraLinear8bitLt"}.get(kind or "")
    if name is None or options.get("parameter_name") is not None:
        return None
    cls = getattr(import_module(__name__), name)
    return cls(target, adapter_name, config=config, **options)  # type: ignore[no-any-return]


def swap(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the class below what is attached, and the methods that hooks of accelerate have put
    on the instance.
    """
    before = type(layer)
    cls = _attached.over(before, cls)
    bound = [a for a in ("forward", "_old_forward") if _conditions.is_bound(layer, a, before)]
    layer.__class__ = cls
    for attribute in bound:
        setattr(layer, attribute, MethodType(cls.forward, layer))
    if not issubclass(cls, Swapped):
        for attribute in (CACHE, _products.NORMS, "shared_input"):
            vars(layer).pop(attribute, None)


def _weight(layer: nn.Module, base: nn.Module) -> Tensor | QuantizedWeight:
    """That of its base, which `why_not` has found fit."""
    # Where it is compiled, reading costs nothing, and pointers mean nothing.
    if _conditions.is_dense(base) or torch.compiler.is_compiling():
        return weight_of(base)
    cache: Cache = vars(layer).get(CACHE) or vars(layer).setdefault(CACHE, Cache())
    return cache.current(base)


def _forget(layer: nn.Module) -> None:
    if not torch.compiler.is_compiling():
        vars(layer).pop(CACHE, None)
        vars(layer).pop(_products.NORMS, None)


def weight_of(base: nn.Module) -> Tensor | QuantizedWeight:
    """`[out, in]`, in its own storage.

    bitsandbytes keeps all of a 4-bit weight in the parameter, of an 8-bit one in the layer.
    """
    kind, params = _conditions.kind_of(base), base._parameters["weight"]
    assert params is not None
    if _conditions.is_dense(base):
        return params.t() if kind == "transposed" else params
    source: Any = params if kind == "4-bit" else base
    return QuantizedWeight.from_bnb(source)
