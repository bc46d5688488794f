"""Modules that stay where they are and get an adapter: a child, which adds to what they give.

The class of such a module becomes a subclass of its own, made when it is first asked for, that
overrides `forward` alone. So parameters, names, hooks, quantised linears inside and whatever asks
`isinstance` or for the name of a class stay as they were.

    y = module(...)        becomes        y = adapter.add(x, module(...))

x is the module's own input, or that of an earlier module where the adapter spans several that are
no module together: between `fc1` and `fc2` of a block that calls both itself.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkern import _family, _select
from peftkern._family import Places, Undo, Wanted

_subclasses: dict[tuple[type, type], type[nn.Module]] = {}


class Attached(nn.Module):
    """What all of them are; a subclass of it and of the module's class replaces the latter."""

    input_name: ClassVar[str | None] = None  # of the first parameter that forward had

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What a call of it is given first."""
        return first(args, kwargs, self.input_name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (_recipe(type(self)),), *reduced[2:])


class Adding(Attached):
    """Has a child `adapter`, whose `add` makes its output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        adapter: Any = self._modules["adapter"]
        x = self.input(args, kwargs) if adapter.carried is None else adapter.carried.take()
        if isinstance(out, Tensor):
            return adapter.add(x, out)
        if not isinstance(out, (tuple, list)) or not isinstance(out[0], Tensor):
            kind = type(out).__name__
            raise TypeError(f"output must be a tensor or begin with one, got {kind}")
        parts = adapter.add(x, out[0]), *out[1:]
        return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)


class Reading(Attached):
    """Hands its input to the adapters of later modules."""

    carries: tuple[Carried, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for carried in self.carries:
            carried.x = self.input(args, kwargs)
        return super().forward(*args, **kwargs)


class Carried(threading.local):
    """An input on its way from the module that reads it to the adapter.

    Threads that call one model at a time have each its own. Copies and pickles are empty, and one
    for both ends where both are copied.
    """

    x: Tensor | None = None

    def __reduce__(self) -> tuple[type[Carried], tuple[()]]:
        return Carried, ()

    def take(self) -> Tensor:
        x, self.x = self.x, None
        if x is None:
            raise RuntimeError(
                "input must be read before the adapter's module runs, got none: the module that "
                "reads it was not called, or is part of another copy"
            )
        return x


def first(args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None) -> Tensor:
    """A call's input: what `forward` calls `name` first, or the first tensor that it is given."""
    for value in (*args, kwargs.get(name) if name else None):
        if isinstance(value, Tensor):
            return value
    for value in kwargs.values():
        if isinstance(value, Tensor):
            return value
    raise TypeError("input must hold a tensor to be adapted, got none")


def swap(module: nn.Module, kind: type[Attached]) -> None:
    """Has the module's forward be that of `kind`, whose `super().forward` is the one before."""
    module.__class__ = subclass(kind, type(module))


def subclass(kind: type[Attached], parent: type[nn.Module]) -> type[nn.Module]:
    """Under the parent's name, by which trainers know blocks; pickle knows it by `_recipe`."""
    if (kind, parent) not in _subclasses:
        names = ("__module__", "__qualname__", "__doc__")
        body = {name: getattr(parent, name) for name in names}
        _, *parameters = inspect.signature(original(parent).forward).parameters
        body["input_name"] = parameters[0] if parameters else None
        _subclasses[kind, parent] = type(parent.__name__, (kind, parent), body)
    return _subclasses[kind, parent]


def over(cls: type[nn.Module], parent: type[nn.Module]) -> type[nn.Module]:
    """What `cls` makes of a module's class, made of another one."""
    if not issubclass(cls, Attached):
        return parent
    kind, below = cls.__bases__
    return subclass(kind, over(below, parent))


def original(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before any adapter."""
    while issubclass(cls, Attached):
        cls = cls.__bases__[1]
    return cls


def _recipe(cls: type) -> Any:
    if cls.__bases__ and issubclass(cls, Attached) and len(cls.__bases__) == 2:
        kind, parent = cls.__bases__
        return kind, _recipe(parent)
    return cls


def _made(recipe: Any) -> type[nn.Module]:
    return subclass(recipe[0], _made(recipe[1])) if isinstance(recipe, tuple) else recipe


def _new(recipe: Any) -> Any:
    cls = _made(recipe)
    return cls.__new__(cls)


class AttachedAdapter(_family.Adapter):
    """The child: `add` gets what the module's own forward has given."""

    carried: Carried | None = None  # where x comes from another module than the one that it adds to

    def reset_parameters(self) -> None:
        """Has them start anew, by functions of `torch.nn.init` alone; then `add` gives y."""
        raise NotImplementedError

    @property
    def _is_hf_initialized(self) -> bool:
        return bool(vars(self).get("_marked", False))

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, marked: bool) -> None:
        """Set by `from_pretrained` of a class that adapts itself, once it has filled in what the
        checkpoint lacks: our parameters with whatever was in memory, linears inside at random.
        """
        vars(self)["_marked"] = marked
        parameters = list(self.parameters())
        if marked and not all(getattr(p, "_is_hf_initialized", False) for p in parameters):
            self.reset_parameters()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y and the adapter's part, in y's shape and dtype.

        Args:
            x: the input that it reads, `[..., in]`.
            y: `[..., out]`.
        """
        raise NotImplementedError


class AttachedConfig(_family.Config):
    """A config whose layers are children of the modules that they add to."""

    def build(self, target: AttachedTarget, device: torch.device | None) -> AttachedAdapter:
        """The child, with parameters of at least float32 on this device."""
        raise NotImplementedError

    def unfit(self, target: AttachedTarget) -> str | None:
        """Why it cannot be had at this place."""
        return None

    def wanted(self, target: AttachedTarget) -> Wanted:
        """What files hold of the child: of one that has no storage."""
        return self.build(target, torch.device("meta")).wanted()


class AttachedTarget(_family.Target):
    """A module that gets a child, or why it cannot.

    Args:
        module, names: what the adapter adds to, and every name it has.
        config: of this place.
        reader: the name of the module whose input the adapter reads; None for its own.
        widths: of that input and of the module's output; None where nothing tells.
    """

    slot = "adapter"
    order = 2  # on what stands there once linears have given way
    kind: type[Attached] = Adding

    def __init__(
        self,
        module: nn.Module,
        names: list[str],
        config: Any,
        reader: str | None,
        widths: tuple[int, int] | None,
    ) -> None:
        super().__init__(module, names, config)
        self.reader, self.widths = reader, widths

    @property
    def layer_name(self) -> str:
        return f"{self.name}.{self.slot}"

    def obstacle(self, model: nn.Module) -> str | None:
        if isinstance(self.module, AttachedAdapter):
            return "is an adapter itself"
        if type(self.module).forward is nn.Module.forward:
            return f"{type(self.module).__name__} is never called"
        if self.slot in self.module._modules:
            if isinstance(self.module._modules[self.slot], _family.Adapter):
                return "has an adapter already"
            return f"has a child of its own named {self.slot}"
        parts = [self.module] + ([model.get_submodule(self.reader)] if self.reader else [])
        if any("forward" in vars(part) for part in parts):
            return "its forward is replaced on the instance, as hooks of accelerate do"
        if reason := _select.closed(model, self.names):
            return reason
        if self.widths is None:
            return f"{type(self.module).__name__} holds no linear that tells its width"
        return self.config.unfit(self)  # type: ignore[no-any-return]

    def wanted(self) -> Wanted:
        return self.config.wanted(self)  # type: ignore[no-any-return]

    def put(self, model: nn.Module, places: Places) -> Iterator[Undo]:
        module = model.get_submodule(self.name)
        adapter = self.config.build(self, _device(module, model))
        yield partial(module._modules.pop, self.slot, None)
        module.add_module(self.slot, adapter)
        yield partial(setattr, module, "__class__", type(module))
        swap(module, self.kind)
        if self.reader is not None:
            reader: Any = model.get_submodule(self.reader)
            adapter.carried = Carried()
            before = vars(reader).get("carries", ())
            yield partial(_stop_reading, reader, type(reader), before)
            if not isinstance(reader, Reading):
                swap(reader, Reading)
            reader.carries = (*before, adapter.carried)


def _stop_reading(reader: Any, cls: type[nn.Module], carries: tuple[Carried, ...]) -> None:
    reader.__class__ = cls
    vars(reader).pop("carries", None)
    if carries:
        reader.carries = carries


def _device(module: nn.Module, model: nn.Module) -> torch.device | None:
    """Of its first parameter or buffer, or of the model's."""
    parts = (*module.parameters(), *module.buffers(), *model.parameters())
    return next((tensor.device for tensor in parts), None)
