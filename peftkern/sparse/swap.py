"""Modules whose parameters train on a support: the same objects, with a class of their own.

The class is a subclass of the one before. Where that is a linear's or a convolution's it overrides
`forward`, and the gradient is made on the support alone. Otherwise, and for whoever reads a
parameter past `forward`, reading it gives the weight as a function of its values: the dense
gradient that arrives is gathered and let go of at once.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peftkern import _family, _select, _swapped
from peftkern._attached import Attached
from peftkern.qlora import bnb
from peftkern.qlora.frozen import FrozenLinear
from peftkern.sparse import stored
from peftkern.sparse.described import Described
from peftkern.sparse.state import SUFFIX, State, resize, states, take

Self = TypeVar("Self", bound="Sparse")


class _Written(torch.autograd.Function):
    """The weight, which holds the values, as a function of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, state: State) -> Tensor:
        ctx.pattern, ctx.watcher, ctx.dtype = state.pattern, state.watcher, values.dtype
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if not torch.compiler.is_compiling() and grad.is_sparse:  # of an embedding
            grad = grad.to_dense()
        if ctx.watcher is not None:
            ctx.watcher.dense(grad)
        return take(grad, ctx.pattern).to(ctx.dtype), None, None


class Sparse(Described):
    """What all of them are."""

    _sparse_states: dict[str, State]
    _sparse_guests: set[str]  # those among them that are at home in another module
    parent: ClassVar[type[nn.Module]]  # the class before
    parameters_read: ClassVar[tuple[str, ...]]  # the names of those that `read` gives

    def read(self, name: str) -> Tensor | None:
        """A parameter as whoever computes with it is to see it."""
        if name not in self._parameters:  # not made yet
            raise AttributeError(name)
        weight, state = self._parameters[name], states(self).get(name)
        if state is None or weight is None or state.merged or state.form == "delta":
            return weight
        values = self._parameters[name + SUFFIX]
        assert values is not None
        state.write(weight, values)
        if not (torch.is_grad_enabled() and values.requires_grad):
            return weight
        return _Written.apply(values, weight, state)  # type: ignore[no-any-return, no-untyped-call]

    def refuse_training(self) -> None:
        """Of a merged one: raises rather than let a step train nothing."""
        trains = any(parameter.requires_grad for parameter in self.trained())
        if self.training and trains and torch.is_grad_enabled():
            raise RuntimeError(
                "layer must be unmerged to train, got a merged one in training mode: unmerge it, "
                "call eval(), or freeze its adapter"
            )

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        """Values keep their dtype, patterns and what the weight held before follow it."""
        values = [self._parameters[name + SUFFIX] for name in states(self)]

        def wide(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            kept = moved.dtype != tensor.dtype and any(tensor is v for v in values)
            return tensor.to(moved.device) if kept else moved

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        for name, state in states(self).items():
            weight = self._parameters[name]
            assert weight is not None
            state.moved(weight.device, fn)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (self.parent, self.parameters_read), *reduced[2:])

    def unload(self) -> None:
        for name in list(states(self)):
            swap_back(self, name)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        facts = (f"{n} {100 * s.pattern.density:.3g} %" for n, s in states(self).items())
        return (
            f"{own}{', ' if own else ''}sparse={', '.join(facts)}" + ", merged=True" * self.merged
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Beside the values, where they are and what the weight was before; merged, the weight
        alone, as the plain module has it."""
        for name, state in states(self).items():
            state.write(self._parameters[name], self._parameters[name + SUFFIX])  # type: ignore[arg-type]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, state in states(self).items():
            if state.merged:
                destination.pop(prefix + name + SUFFIX, None)
                continue
            for key, tensor in stored.state_parts(state).items():
                destination[f"{prefix}{name}{SUFFIX}.{key}"] = tensor

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Takes the entries that were saved, which may be others than those that are here."""
        others = dict(state_dict)
        for name, state in states(self).items():
            key = prefix + name + SUFFIX
            found = {part: others.pop(f"{key}.{part}", None) for part in stored.STATE_PARTS}
            if state.merged:
                errors.append(
                    f"{key}: the layer must be unmerged before it loads, got a merged layer"
                )
                return
            if key not in others:
                continue  # which the module itself reports
            try:
                state.load(*stored.loaded(found, others[key], state, self.shape_of(name)))
            except (TypeError, ValueError) as error:
                errors.append(f"{key}: {error}")
                others[key] = self._parameters[name + SUFFIX]
                continue
            held = self._parameters[name + SUFFIX]
            assert held is not None
            if held.shape != others[key].shape:
                resize(held, others[key].shape[0])
        super()._load_from_state_dict(others, prefix, metadata, strict, missing, unexpected, errors)


class Recurrent(Sparse):
    """torch's recurrent modules, which compute with a list of their parameters."""

    @property
    def _flat_weights(self) -> list[Any]:
        names: Any = self._flat_weights_names
        return [getattr(self, name, None) for name in names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        """Theirs is made of the same parameters."""


def reader(name: str) -> property:
    """What stands in a class for a parameter that is read by `Sparse.read`."""
    return property(lambda module: module.read(name))


made: dict[tuple[type[nn.Module], tuple[str, ...]], type[Sparse]] = {}
# What overrides the forward of a class whose forward this is; layer.py fills it in.
KINDS: dict[Any, type[Sparse]] = {nn.RNN.forward: Recurrent, nn.LSTM.forward: Recurrent,
                                  nn.GRU.forward: Recurrent}  # fmt: skip
PRODUCTS: set[type[Sparse]] = set()  # those among them that compute by our ops, in both forms
TRANSPOSED: list[type[Sparse]] = []  # what does so for transformers' Conv1D


def kind_of(cls: type[nn.Module]) -> type[Sparse]:
    if _select.is_a_class(cls, "transformers", "Conv1D"):
        from transformers.pytorch_utils import Conv1D

        if cls.forward is Conv1D.forward:
            return TRANSPOSED[0]
    return KINDS.get(getattr(cls, "forward", None), Sparse)


def subclass(parent: type[nn.Module], names: tuple[str, ...]) -> type[Sparse]:
    """Of a class and its parameters' names; under the class's own name, by which others know it."""
    if (parent, names) not in made:
        body: dict[str, Any] = {
            key: getattr(parent, key) for key in ("__module__", "__qualname__", "__doc__")
        }
        body |= {name: reader(name) for name in names}
        body |= {"parent": parent, "parameters_read": names}
        made[parent, names] = type(parent.__name__, (kind_of(parent), parent), body)
    return made[parent, names]


def swap(
    module: nn.Module, attribute: str, state: State, values: nn.Parameter, guest: bool = False
) -> None:
    """Has a module compute with the support of one of its parameters, whose home may be another."""
    if not isinstance(module, Sparse):
        module.__class__ = subclass(type(module), tuple(sorted(module._parameters)))
        vars(module).update(_sparse_states={}, _sparse_guests=set())
        vars(module).pop("_flat_weights", None)
    states(module)[attribute] = state
    if guest:
        vars(module)["_sparse_guests"].add(attribute)
    module.register_parameter(attribute + SUFFIX, values)


def swap_back(module: Any, attribute: str) -> None:
    """The reverse; the weight stays as it is."""
    del states(module)[attribute]
    del module._parameters[attribute + SUFFIX]
    vars(module)["_sparse_guests"].discard(attribute)
    if not states(module):
        recurrent = isinstance(module, Recurrent)
        module.__class__ = module.parent
        del vars(module)["_sparse_states"], vars(module)["_sparse_guests"]
        if recurrent:
            module._init_flat_weights()


def obstacle(module: nn.Module, attribute: str, form: str) -> str | None:
    """Why this parameter can have no support; None where it can."""
    if attribute in states(module):
        return "has a support already"
    if attribute.endswith(SUFFIX) or attribute + SUFFIX in module._parameters:
        return "has a name that is taken"
    if not isinstance(module, Sparse) and isinstance(
        module, (_family.Adapter, Attached, _swapped.Swapped)
    ):
        return "is part of an adapter"
    if isinstance(module, torch.jit.ScriptModule):
        return "belongs to a scripted module"
    if hasattr(module._parameters[attribute], "device_mesh"):
        return "is sharded"
    if isinstance(module, FrozenLinear) or bnb.is_quantized(module):
        return "is quantised, or may be: SparseConfig(form='delta') adapts such a linear"
    kind = kind_of(getattr(module, "parent", type(module)))
    if form == "delta" and (kind not in PRODUCTS or attribute != "weight"):
        return "is no weight of a linear or a convolution, as the delta form needs"
    return None


def _new(parent: type[nn.Module], names: tuple[str, ...]) -> Any:
    cls = subclass(parent, names)
    return cls.__new__(cls)
