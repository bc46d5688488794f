"""The adapted tensors of a model: where their packed values live, and how these reach the weights.

Beside an adapted parameter `weight` its module gets a parameter `weight_sparse`: the values of its
support, packed, in float32. Being a parameter, it is seen by optimisers, clipping and DDP. The
weight stays where it was, frozen, under its own name, and holds the same values rounded to its
dtype ("value"), or never learns of them ("delta").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import _check
from peftkern._seen import Seen
from peftkern.sparse import swap
from peftkern.sparse.check import FORMS
from peftkern.sparse.pattern import Pattern, matrix_shape
from peftkern.sparse.state import SUFFIX, State, Watcher, common, resize, states, take, union

Owner = tuple[nn.Module, str]  # a module, and a parameter's name in it


class Support:
    """One adapted tensor of a model; a view, made anew at each asking.

    Args:
        name: of the parameter in the model.
        module: the first that holds it.
        attribute: the parameter's name there.
    """

    def __init__(self, name: str, module: nn.Module, attribute: str) -> None:
        self.name, self.module, self.attribute = name, module, attribute

    @property
    def state(self) -> State:
        return states(self.module)[self.attribute]

    @property
    def weight(self) -> nn.Parameter:
        """The frozen base parameter."""
        return self.module._parameters[self.attribute]  # type: ignore[return-value]

    @property
    def values(self) -> nn.Parameter:
        """`[nnz]`, float32 (float64 of a float64 weight), in the order of the pattern."""
        return self.module._parameters[self.attribute + SUFFIX]  # type: ignore[return-value]

    @property
    def pattern(self) -> Pattern:
        return self.state.pattern

    @property
    def form(self) -> str:
        return self.state.form

    def write(self) -> None:
        """Puts the values into the weight, if they have moved since they were put there."""
        self.state.write(self.weight, self.values)

    @torch.no_grad()
    def wrote(self) -> None:
        """Says that whoever moved the values has written the weight as well."""
        self.state.seen = Seen([self.weight, self.values])

    def watch(self, watcher: Watcher | None) -> None:
        """Has the watcher shown every gradient of the whole tensor; None ends it."""
        self.state.watcher = watcher

    @torch.no_grad()
    def replace(self, pattern: Pattern, values: Tensor | None = None) -> None:
        """Trains other entries from now on; the parameter stays the same object, without its grad.

        Entries that fall out stay as they have become; those that come in start as they are.

        Args:
            pattern: of the weight's shape.
            values: `[nnz]`; None keeps those that stay, and takes the others from the weight.

        Raises:
            ValueError: another shape, or a delta form that would lose what an entry has learned.
        """
        state, weight, old = self.state, self.weight, self.values
        if pattern.shape != state.pattern.shape:
            raise ValueError(
                f"pattern must have shape {list(state.pattern.shape)}, got {list(pattern.shape)}"
            )
        pattern = pattern.to(weight.device)
        self.write()
        kept, places = common(state.pattern, pattern)
        if state.form == "delta" and len(kept) < state.pattern.nnz:
            raise ValueError(
                "pattern must keep every entry of the delta form, which has no place else for what "
                f"they have learned, got one without {state.pattern.nnz - len(kept)} of them"
            )
        if values is None:
            values = torch.zeros(pattern.nnz, dtype=old.dtype, device=old.device)
            if state.form == "value":
                values = take(weight, pattern).to(old.dtype)
            values[places] = old.detach()[kept]
        _check.shape("values", values, [pattern.nnz])
        self._remember(pattern)
        resize(old, pattern.nnz)
        old.copy_(values)
        state.pattern = pattern
        self.write()

    def _remember(self, pattern: Pattern) -> None:
        """What the weight holds where it has never trained."""
        state = self.state
        if state.base is None:
            state.origin = pattern
            return
        kept, places = common(pattern, state.origin)
        if len(kept) == pattern.nnz:  # the most frequent case: nothing is new
            state.origin = pattern if pattern.nnz == state.origin.nnz else state.origin
            return
        origin = pattern if len(places) == state.origin.nnz else union(state.origin, pattern)
        base = take(self.weight, origin)
        _, places = common(state.origin, origin)
        base[places] = state.base
        state.origin, state.base = origin, base

    def __repr__(self) -> str:
        return f"Support({self.name!r}, {self.pattern!r}, form={self.form!r})"


def supports(model: nn.Module) -> list[Support]:
    """Every adapted tensor of a model, each once, in the model's order."""
    found, seen = [], set()
    for name, module in model.named_modules():
        for attribute, state in states(module).items():
            if id(state) not in seen:
                seen.add(id(state))
                found.append(Support(f"{name}.{attribute}".lstrip("."), module, attribute))
    return found


@torch.no_grad()
def attach(
    model: nn.Module,
    selection: Mapping[str, Pattern],
    form: str = "value",
    rule: dict[str, Any] | None = None,
) -> list[Support]:
    """Gives parameters of a model a support each, on which alone they train.

    In place, and all or nothing. The modules keep their parameters, names, hooks and children; of
    linears and convolutions the gradient is made on the support alone, of all other modules the
    whole tensor's is, and let go of at once. A parameter that several modules share has one support
    for all of them. What is not selected stays as it is, and trains if it did.

    Args:
        model: of any modules; the model itself may be one.
        selection: a pattern for each parameter that trains, by its name; of a parameter of more
            than two axes a pattern of `[shape[0], rest]`, of one of a single axis `[1, n]`.
        form: "value": the weight holds the values; "delta": they are added to what it gives, by
            linears and convolutions alone.
        rule: how they were selected, for files.

    Returns:
        The supports, in the selection's order.

    Raises:
        TypeError: a parameter that is not float.
        ValueError: a name that there is not, a shape that does not fit, a parameter that has a
            support already or shares memory with another one, or a module that cannot take one.
    """
    if form not in FORMS:
        raise ValueError(f"form must be 'value' or 'delta', got {form!r}")
    owners = owners_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, pattern in selection.items():
        if name not in parameters:
            raise ValueError(f"selection must name parameters of the model, got {name!r}")
        _refuse(name, parameters[name], pattern, owners[id(parameters[name])], form)
    chosen = {id(parameters[name]): name for name in selection}
    _refuse_overlaps({name: parameters[name] for name in selection}, chosen)
    return [
        put_on(name, owners[id(parameters[name])], pattern, form, rule)
        for name, pattern in selection.items()
    ]


@torch.no_grad()
def put_on(
    name: str, owners: Sequence[Owner], pattern: Pattern, form: str, rule: dict[str, Any] | None
) -> Support:
    """Of one parameter, for which nothing speaks against it."""
    home, own_name = owners[0]
    weight = home._parameters[own_name]
    assert weight is not None
    pattern = pattern.to(weight.device)
    wide = torch.promote_types(weight.dtype, torch.float32)
    base = take(weight, pattern) if form == "value" else None
    start = weight.new_zeros(pattern.nnz, dtype=wide) if base is None else base.to(wide, copy=True)
    values = nn.Parameter(start)
    state = State(pattern, form, base)
    state.rule, state.seen = rule, Seen([weight, values])  # they are in the weight already
    weight.requires_grad_(False)
    for module, attribute in owners:
        swap.swap(module, attribute, state, values, guest=(module, attribute) != owners[0])
    return Support(name, home, own_name)


def detach(support: Support, model: nn.Module) -> None:
    """Leaves the weight as it is, frozen, and takes everything else away."""
    support.write()
    for module, attribute in owners_of(model)[id(support.weight)]:
        swap.swap_back(module, attribute)


def owners_of(model: nn.Module) -> dict[int, list[Owner]]:
    """Of every parameter, by id, the modules that hold it and its name there."""
    found: dict[int, list[Owner]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, attribute))
    return found


def _refuse(
    name: str,
    weight: Tensor,
    pattern: Pattern,
    owners: Sequence[Owner],
    form: str,
) -> None:
    _check.dtype(name, weight)
    if list(pattern.shape) != list(matrix_shape(weight.shape)):
        raise ValueError(
            f"selection must have the shape {list(matrix_shape(weight.shape))} for {name}, got "
            f"{list(pattern.shape)}"
        )
    if weight.is_meta:
        raise ValueError(f"{name} must have storage, got a tensor on the meta device")
    for module, attribute in owners:
        if (reason := swap.obstacle(module, attribute, form)) is not None:
            raise ValueError(
                f"{name} must be able to take a support, got a parameter that {reason}"
            )


def _refuse_overlaps(weights: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
    """Two parameters on the same memory would each write over the other."""
    if len(names) < len(weights):
        raise ValueError("selection must name a shared parameter once, got it by two names")
    spans = sorted(
        (w.data_ptr(), w.data_ptr() + w.nbytes, name) for name, w in weights.items() if w.numel()
    )
    for (_, end, first), (begin, _, second) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise ValueError(
                f"selection must name parameters of separate memory, got {first} and {second} on "
                "the same"
            )
