"""Which modules a config names, and what is known of them by their names and classes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

# Routers choose experts; what they decide is not what an adapter should shift unasked.
ROUTER_NAME = re.compile(r"(^|\.)(gate|\w*expert_gate|\w*router\w*)(\.|$)")
ROUTER_CLASS = re.compile(r"Router|Gating|TopkGate|TopKGate")


def names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with every name it has, the root left out: it has no place to be swapped in."""
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names[module].append(name)
    return names


def owners(model: nn.Module) -> dict[int, list[str]]:
    """For every parameter, by id, the modules that hold it."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    return owners


def named(module: nn.Module, name: str, config: Any) -> bool:
    if matches(config.exclude_modules, name):
        return False
    if config.target_modules == "all-linear":
        return is_linear(module)
    return matches(config.target_modules, name)


def matches(patterns: str | Iterable[str], name: str) -> bool:
    """As in peft: a string is a regular expression for the whole name, others are its endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in patterns)


def heads_and_routers(model: nn.Module) -> dict[nn.Module, str]:
    """What "all-linear" leaves alone."""
    special: dict[nn.Module, str] = {}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        tied = id(weight) in embeddings and not isinstance(module, nn.Embedding)
        if tied or name.rpartition(".")[2] == "lm_head":
            special[module] = "the output head, which only its own name targets"
        elif ROUTER_NAME.search(name) or ROUTER_CLASS.search(type(module).__name__):
            special |= dict.fromkeys(module.modules(), "a router, which only its own name targets")
        if callable(get := getattr(module, "get_output_embeddings", None)):
            try:
                head = get()
            except (AttributeError, NotImplementedError):
                continue  # a model of transformers that has no head
            if isinstance(head, nn.Module):
                special[head] = "the output head, which only its own name targets"
    return special


def closed(model: nn.Module, places: list[str]) -> str | None:
    """Modules that read a child's weight past its forward would pass an adapter over in silence."""
    for name in places:
        parts = name.split(".")
        for depth in range(len(parts)):
            parent = model.get_submodule(".".join(parts[:depth]))
            if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
                return f"nn.{type(parent).__name__} reads its weight without calling it"
            if is_a(parent, "peft", "BaseTunerLayer"):
                return "inside an adapter of peft"
    return None


def is_a(module: nn.Module, package: str, name: str) -> bool:
    """An instance of a class of a package that need not be installed."""
    return is_a_class(type(module), package, name)


def is_a_class(cls: type, package: str, name: str) -> bool:
    return any(
        kind.__name__ == name and kind.__module__.split(".")[0] == package for kind in cls.__mro__
    )


def refuse_wrapped(model: nn.Module) -> None:
    """Raises ValueError where what is put in now would train in each process for itself."""
    for module in model.modules():
        if is_a(module, "torch", "DistributedDataParallel"):
            raise ValueError(
                "model must be adapted before DistributedDataParallel wraps it, got it wrapped"
            )


def linears(names: dict[nn.Module, list[str]]) -> list[str]:
    """The names of all linears, with a star for the number of a layer."""
    found = [starred(places[0]) for module, places in names.items() if is_linear(module)]
    return list(dict.fromkeys(found))


def starred(name: str) -> str:
    """So that what holds for every layer is said once."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def is_linear(module: nn.Module) -> bool:
    """By name too, so that formats that peftkern does not know are reported."""
    named = "Linear" in type(module).__name__
    return named or isinstance(module, nn.Linear) or is_a(module, "transformers", "Conv1D")
