"""Where the sublayers of a transformer are: what its blocks call their attention and their MLP.

A block is a layer of a list or a sequence that has both, by the names that transformers and timm
give their parts. A sublayer that is a module is the place itself. One that is none, as where the
block calls `fc1` and `fc2` itself, reaches from the module that reads x to the last one before the
sum with the stream. That sum is outside a place, and so is a norm behind it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftkern import _attached, _select
from peftkern.qlora.placing import features

# From the module that reads to that which is added to, by the names of a block's parts, the first
# that are there: BERT and its kin (and the vision models of transformers 4); BART, Whisper and OPT,
# whose blocks call the MLP's linears themselves; and where either is a module, by its name.
ROUTES: dict[str, tuple[tuple[str, ...], ...]] = {
    "attn": (
        ("attention.self", "attention.output.dropout"),
        ("attention.self", "attention.output.dense"),
        ("attention.attention", "attention.output.dropout"),
        ("self_attn",),
        ("attn",),
        ("attention",),
        ("self_attention",),
        ("SelfAttention",),
    ),
    "ffn": (
        ("intermediate", "output.dropout"),
        ("intermediate", "output.dense"),
        ("fc1", "fc2"),
        ("mlp",),
        ("feed_forward",),
        ("ffn",),
        ("block_sparse_moe",),
        ("DenseReluDense",),
    ),
}
# T5 has a module for each sublayer with its norm; these names are no others'.
ALONE = ("SelfAttention", "DenseReluDense")


@dataclass(frozen=True)
class Place:
    """Where an adapter goes.

    Args:
        module, names: what it adds to, and every name it has.
        reader: the name of the module that reads x, where that is another.
        widths: of x and of the module's output; None where nothing tells.
    """

    module: nn.Module
    names: list[str]
    reader: str | None
    widths: tuple[int, int] | None


def by_place(model: nn.Module, place: str) -> Iterator[Place]:
    """Those of every block, in the model's order; `place` is "attn", "ffn" or "both"."""
    names = _select.names(model)
    listed = {layer for _, layer in _listed(model)}
    for block, (name, *_) in names.items():
        if block not in listed:
            continue
        routes = {kind: route for kind in ROUTES if (route := _route(block, kind)) is not None}
        if len(routes) < len(ROUTES) and not any(r[-1] in ALONE for r in routes.values()):
            continue
        width = _stream(block)
        for kind, route in routes.items():
            if place in (kind, "both"):
                yield _place(names, block, name, _inside(block, route), width)


def by_name(
    model: nn.Module, patterns: str | Iterable[str], channels: bool = False
) -> Iterator[Place]:
    """Every module of a name that fits; it is called with x, and has a linear or a norm inside.

    With `channels` x and y are images, whose widths convolutions inside tell first.
    """
    for module, names in _select.names(model).items():
        if any(_select.matches(patterns, name) for name in names):
            widths = _channels(module) if channels else None
            first, last = _linears(module)
            if widths is None and first is not None:
                widths = features(first)[1], features(last)[0]
            if widths is None and (width := _stream(module) or _width(module)) is not None:
                widths = (width, width)
            yield Place(module, names, None, widths)


def lists(model: nn.Module) -> list[str]:
    """The classes of layers in lists, by the list's name."""
    found = {name: type(layer).__name__ for name, layer in _listed(model)}
    return [f"{kind} in {_select.starred(name)}" for name, kind in found.items()]


def _listed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for layer in module:
                yield name, layer


def _route(block: nn.Module, kind: str) -> tuple[str, ...] | None:
    for route in ROUTES[kind]:
        if all(_part(block, name) is not None for name in route):
            return route
    return None


def _inside(block: nn.Module, route: tuple[str, ...]) -> tuple[str, ...]:
    """A module that is given the residual adds it itself, as Bloom's do: then its last linear."""
    if len(route) > 1:
        return route
    module = block.get_submodule(route[0])
    forward = _attached.original(type(module)).forward
    if "residual" not in inspect.signature(forward).parameters:
        return route
    inner = [name for name, child in module.named_modules() if name and _is_linear(child)]
    return (route[0], f"{route[0]}.{inner[-1]}") if inner else route


def _place(
    names: dict[nn.Module, list[str]],
    block: nn.Module,
    name: str,
    route: tuple[str, ...],
    width: int | None,
) -> Place:
    module = block.get_submodule(route[-1])
    reader = f"{name}.{route[0]}" if len(route) > 1 else None
    widths = None if width is None else (width, width)
    if widths is None:
        (first, _), (_, last) = _linears(block.get_submodule(route[0])), _linears(module)
        last = last or _linears(block.get_submodule(route[-1].rpartition(".")[0]))[1]
        if first is not None and last is not None:
            widths = features(first)[1], features(last)[0]
    # The name that lies in this block comes first.
    own = f"{name}.{route[-1]}"
    return Place(module, [own, *(n for n in names[module] if n != own)], reader, widths)


def _part(block: nn.Module, name: str) -> nn.Module | None:
    module: nn.Module | None = block
    for word in name.split("."):
        module = None if module is None else module._modules.get(word)
    return module


def _stream(block: nn.Module) -> int | None:
    """What a sublayer reads and adds to is as wide as the norms between them."""
    for child in block.children():
        if (width := _width(child)) is not None:
            return width
    return None


def _width(module: nn.Module) -> int | None:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or "Norm" not in type(module).__name__:
        return None
    return weight.shape[0]


def _linears(module: nn.Module) -> tuple[Any, Any]:
    """The first and the last inside, or itself."""
    found = [part for part in module.modules() if _is_linear(part)]
    return (found[0], found[-1]) if found else (None, None)


def _channels(module: nn.Module) -> tuple[int, int] | None:
    found = [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d))]
    return (found[0].in_channels, found[-1].out_channels) if found else None


def _is_linear(module: nn.Module) -> bool:
    sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
    return (sizes or _select.is_a(module, "transformers", "Conv1D")) and _select.is_linear(module)
