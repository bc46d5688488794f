"""Which modules a config names, which of them can take an adapter, and why the others cannot."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import _check
from peftkern.qlora import LoraConfig, QLoRALinear, bnb, formats, init
from peftkern.qlora.config import storage_obstacle
from peftkern.qlora.frozen import FrozenLinear

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


def named(module: nn.Module, name: str, config: LoraConfig) -> bool:
    if matches(config.exclude_modules, name):
        return False
    if config.target_modules == "all-linear":
        return _is_linear(module)
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


def obstacle(
    model: nn.Module,
    module: nn.Module,
    places: list[str],
    config: LoraConfig,
    tied: Sequence[str] = (),
) -> str | None:
    """Why this module cannot take an adapter; None where it can.

    Args:
        model: in which the module stands at `places`.
        config: the module's own.
        tied: other modules that hold its weight.
    """
    kind = type(module).__name__
    if isinstance(module, QLoRALinear):
        return "has an adapter already"
    if reason := _closed(model, places):
        return reason
    if "forward" in vars(module):
        return "its forward is replaced on the instance, as hooks of accelerate do"
    weight = module._parameters.get("weight")
    if type(module) is FrozenLinear:
        return _obstacle_quantized(module, config, None)
    if is_a(module, "bitsandbytes", "Linear4bit"):
        return _obstacle_quantized(
            module, config, _obstacle_4bit(getattr(weight, "quant_state", None))
        )
    if is_a(module, "bitsandbytes", "Linear8bitLt"):
        return _obstacle_quantized(module, config, _obstacle_8bit(module))
    transposed = is_a(module, "transformers", "Conv1D")
    if not transposed and getattr(type(module), "forward", None) is not nn.Linear.forward:
        return f"{kind} is none of nn.Linear, Conv1D, Linear4bit and Linear8bitLt"
    if weight is None:
        return "its weight is computed, not stored"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.is_meta:
        return "its weight is on the meta device"
    if weight.dtype not in _check.FLOATS:
        return f"its weight is {weight.dtype}, not float"
    if weight.numel() == 0:
        return "its weight is empty"
    if config.base is None and config.merge_aware:
        return "its base is not quantised, which merge_aware needs"
    if tied and is_transposed(module):
        return f"its weight is stored transposed and tied to {tied[0]}, which a copy would part"
    return storage_obstacle(weight.numel(), config) or init.obstacle(config, *features(module))


def is_transposed(module: nn.Module) -> bool:
    """A dense weight that the kernels, which read rows, can only take as a copy."""
    if is_a(module, "transformers", "Conv1D"):
        return True
    weight = module.weight
    assert isinstance(weight, Tensor)
    return not weight.is_contiguous()


def features(module: nn.Module) -> tuple[int, int]:
    """out and in of a linear of any kind that takes an adapter."""
    if is_a(module, "transformers", "Conv1D"):
        rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
        return columns, rows
    return module.out_features, module.in_features  # type: ignore[return-value]


def _obstacle_quantized(module: nn.Module, config: LoraConfig, reason: str | None) -> str | None:
    if config.start == "loftq":
        return "quantised already, and LoftQ needs the float weight"
    return reason or init.obstacle(config, *features(module))


NOT_YET = "not quantised yet: bitsandbytes does it when the model moves to its device"


def _obstacle_4bit(state: Any) -> str | None:
    if state is None:
        return NOT_YET
    if state.quant_type not in formats:
        return f"its format {state.quant_type} is none of {', '.join(formats)}"
    # Its state_dict takes the mark away and puts the bytes back, but not the scales.
    scales = [state.absmax.dim() == 1, not state.nested or state.offset.dtype == torch.float32]
    if getattr(state, "packing_format_for_cpu", False) or not all(scales):
        return "bitsandbytes has repacked it at an eval forward, with other scales"
    return None


def _obstacle_8bit(module: nn.Module) -> str | None:
    state: Any = module.state
    if state.has_fp16_weights:
        return "its weight is kept in float, and quantised at every forward"
    if state.threshold > 0:
        return (
            f"its threshold is {state.threshold:g}: activations beyond it take a way of their own, "
            "which peftkern lacks"
        )
    return None if bnb.is_quantized(module) else NOT_YET


def _closed(model: nn.Module, places: list[str]) -> str | None:
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
    return any(
        kind.__name__ == name and kind.__module__.split(".")[0] == package
        for kind in type(module).__mro__
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
    found = [starred(places[0]) for module, places in names.items() if _is_linear(module)]
    return list(dict.fromkeys(found))


def starred(name: str) -> str:
    """So that what holds for every layer is said once."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def unmatched(config: LoraConfig, names: dict[nn.Module, list[str]]) -> list[str]:
    """The listed endings that no module has."""
    if isinstance(config.target_modules, str):
        return []
    there = [name for places in names.values() for name in places]
    return [e for e in config.target_modules if not any(matches([e], name) for name in there)]


def _is_linear(module: nn.Module) -> bool:
    """By name too, so that formats that peftkern does not know are reported."""
    named = "Linear" in type(module).__name__
    return named or isinstance(module, nn.Linear) or is_a(module, "transformers", "Conv1D")
