"""Saves and loads adapters, in peft's two files and under peft's names."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from peftkern import _check, _folder, _peft, _select, _sharded
from peftkern._folder import CONFIG, TENSORS
from peftkern.adapt import adapters, place, plan
from peftkern.qlora import LoraConfig, QLoRALinear

Model = TypeVar("Model", bound=nn.Module)

PREFIX = "base_model.model."
# What a layer may have in a file, by its key behind the layer's name. peft has written magnitudes
# with and without `.weight`.
PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "base_layer.bias": "bias",
}
KEY = re.compile(re.escape(PREFIX) + rf"(.+)\.({'|'.join(map(re.escape, PARTS))})")
KEY_OF = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "bias": "base_layer.bias"}

Parts = dict[str, Tensor]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What `save_adapter` writes.

    Args:
        model: adapted.

    Returns:
        `base_model.model.<name>.lora_A.weight` `[r, in]` and `….lora_B.weight` `[out, r]` of every
        adapted linear, detached, in the parameters' own storage; with DoRA
        `….lora_magnitude_vector` `[out]`, where the bias trains `….base_layer.bias` `[out]`. An
        adapter that takes its start off again is one of rank 2 r, `[A; A0]` and `[B, -B0]`.

    Raises:
        ValueError: the model has no adapter, or is wrapped in FullyShardedDataParallel.
    """
    return {
        f"{PREFIX}{name}.{KEY_OF.get(part, part)}": tensor
        for name, layer in _adapters(model).items()
        for part, tensor in _parts(layer).items()
    }


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a folder that `load_adapter` and peft's `PeftModel.from_pretrained` read.

    All or nothing: killed at any moment, it leaves the adapter that was there, or the new one.
    One process may write to a path at a time. However the adapter started, what is written belongs
    to the base as it was before `adapt`; that of "loftq_N" alone, with N above 1, to the quantised
    base that is in the model, and saving it warns.

    Args:
        model: adapted.
        path: a folder, made where it is missing; its other files are left alone.

    Raises:
        ValueError: the model has no adapter, or is wrapped in FullyShardedDataParallel.
    """
    model = _unwrapped(model)
    layers = _adapters(model)
    if any(layer.own_base for layer in layers.values()):
        warnings.warn(
            "the adapter belongs to the base that 'loftq_N' has made, which its files do not hold: "
            "save model.state_dict() as well",
            stacklevel=2,
        )
    others = [n for name, _ in model.named_modules() if (n := _plain(name)) not in layers]
    content = _peft.to_file(layers, others, getattr(model, "name_or_path", None) or None)
    state = adapter_state_dict(model)
    tensors = {k: _sharded.whole(v).cpu().contiguous() for k, v in state.items()}
    with _sharded.first_process(model.parameters()) as first:
        if first:
            _folder.write(
                Path(path),
                json.dumps(content, indent=2, sort_keys=True).encode() + b"\n",
                safetensors.torch.save(tensors, {"format": "pt"}),
            )


def load_adapter(model: Model, path: str | os.PathLike[str]) -> Model:
    """Reads what `save_adapter` or peft has written into a model, which then computes the same.

    In place, and all or nothing: names, shapes and dtypes are checked before anything changes.

    Args:
        model: has an adapter in the very same places, or none at all, and then gets one there on
            its base as it is. Parameters keep their dtype and their dropout. A model that is
            spread over processes needs its adapter first; each process reads the folder.
        path: the folder.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is truncated, corrupt or foreign, does not fit the model, or asks for
            what peftkern does not have; or the model is spread over processes by
            FullyShardedDataParallel, or otherwise and has no adapter yet.
        TypeError: a tensor is not float.
    """
    inner = _unwrapped(model)
    content, tensors = _folder.read(Path(path))
    stored = _checked(tensors)
    config = _peft.from_file(content, stored)
    for name, parts in stored.items():
        if (r := _peft.of_module(config, name).r) != (have := len(parts["lora_A"])):
            raise ValueError(f"{name}.lora_A must have {r} rows as {CONFIG} says, got {have}")
        if config.use_dora != ("lora_magnitude_vector" in parts):
            raise ValueError(
                f"{name} must have a lora_magnitude_vector where {CONFIG} says use_dora and only "
                f"there, got {', '.join(parts)} and use_dora {config.use_dora}"
            )
    if not adapters(inner):
        _select.refuse_wrapped(model)
        _place(inner, stored, config)
    layers = _adapters(inner)
    _check_fit(stored, {name: _shapes(layer) for name, layer in layers.items()})
    with torch.no_grad():
        for name, parts in stored.items():
            _fill(layers[name], parts)
            layers[name].rescale(_peft.of_layer(config, name, layers[name]))
    return model


def _adapters(model: nn.Module) -> dict[str, QLoRALinear]:
    if not (layers := adapters(_unwrapped(model))):
        raise ValueError("model must have an adapter (peftkern.adapt puts one in), got none")
    _sharded.settle(model)
    return {_plain(name): layer for name, layer in layers.items()}


def _unwrapped(model: nn.Module) -> nn.Module:
    """DistributedDataParallel puts one more name in front of every other; so may torch.compile."""
    while (name := type(model).__name__) in ("OptimizedModule", "DistributedDataParallel"):
        model = model.get_submodule("_orig_mod" if name == "OptimizedModule" else "module")
    return model


def _plain(name: str) -> str:
    """Without what torch.compile and torch's activation checkpointing put between."""
    return re.sub(r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module)\.", "", name)


def _parts(layer: QLoRALinear) -> Parts:
    """What a file holds of the layer."""
    parts: dict[str, Tensor | None] = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    if layer.initial_A is not None and layer.initial_B is not None:
        parts = {
            "lora_A": torch.cat([_sharded.whole(layer.lora_A), layer.initial_A]),
            "lora_B": torch.cat([_sharded.whole(layer.lora_B), -layer.initial_B], 1),
        }
    parts["lora_magnitude_vector"] = layer.lora_magnitude_vector
    parts["bias"] = layer.bias if layer.trains_bias else None
    return {name: part.detach() for name, part in parts.items() if part is not None}


def _fill(layer: QLoRALinear, parts: Parts) -> None:
    """The reverse of `_parts`."""
    a, b = parts["lora_A"], parts["lora_B"]
    if layer.initial_A is not None and layer.initial_B is not None:
        layer.initial_A.copy_(a[layer.r :])
        layer.initial_B.copy_(-b[:, layer.r :])
    _sharded.fill(layer.lora_A, a[: layer.r])
    _sharded.fill(layer.lora_B, b[:, : layer.r])
    if layer.lora_magnitude_vector is not None:
        _sharded.fill(layer.lora_magnitude_vector, parts["lora_magnitude_vector"])
    if layer.bias is not None and "bias" in parts:
        _sharded.fill(layer.bias, parts["bias"])


# What is wanted of each part: its shape, and whether a file must have it.
Wanted = dict[str, tuple[list[int], bool]]


def _wanted(r: int, rows: int, columns: int, dora: bool, bias: bool, trains_bias: bool) -> Wanted:
    wanted = {"lora_A": ([r, columns], True), "lora_B": ([rows, r], True)}
    if dora:
        wanted["lora_magnitude_vector"] = ([rows], True)
    if bias:
        wanted["bias"] = ([rows], trains_bias)
    return wanted


def _shapes(layer: QLoRALinear) -> Wanted:
    has_bias = layer.bias is not None
    size = (_peft.rank(layer), layer.out_features, layer.in_features)
    return _wanted(*size, layer.use_dora, has_bias, layer.trains_bias)


def _place(model: nn.Module, stored: dict[str, Parts], config: LoraConfig) -> None:
    planned = plan(model, [config])
    if planned.skipped:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in planned.skipped)
        raise ValueError(f"{TENSORS} must fit the model, got modules that cannot: {reasons}")
    fits = {}
    for module, (name, own) in planned.modules.items():
        has_bias = module.bias is not None
        fits[name] = _wanted(own.r, *_select.features(module), own.use_dora, has_bias, False)
    _check_fit(stored, fits)
    place(model, planned)


def _check_fit(stored: dict[str, Parts], places: dict[str, Wanted]) -> None:
    for title, names in (
        ("the model has no such adapter", stored.keys() - places.keys()),
        ("the file lacks them", places.keys() - stored.keys()),
    ):
        if names:
            raise ValueError(
                f"{TENSORS} must hold the model's adapters, got {title}: {_listed(names)}"
            )
    for name, have in stored.items():
        wanted = places[name]
        missing = {part for part, (_, needed) in wanted.items() if needed} - have.keys()
        if missing or have.keys() - wanted.keys():
            raise ValueError(
                f"{name} must have {', '.join(wanted)} as in the model, got {', '.join(have)}"
            )
        for part, tensor in have.items():
            _check.shape(f"{name}.{part}", tensor, wanted[part][0])


def _listed(names: Any) -> str:
    first = sorted(names)
    return ", ".join(first[:8]) + (f" and {len(first) - 8} more" if len(first) > 8 else "")


def _checked(tensors: dict[str, Tensor]) -> dict[str, Parts]:
    """The parts of every module, checked against each other."""
    stored: dict[str, Parts] = {}
    foreign = []
    for key, tensor in tensors.items():
        if match := KEY.fullmatch(key):
            stored.setdefault(match[1], {})[PARTS[match[2]]] = tensor
        else:
            foreign.append(key)
    if foreign or not stored:
        raise ValueError(
            f"{TENSORS} must hold {PREFIX}<name>.lora_A.weight and lora_B.weight, magnitudes and "
            f"biases alone, got {_listed(foreign) or 'nothing'}"
        )
    for name, parts in stored.items():
        if not {"lora_A", "lora_B"} <= parts.keys():
            raise ValueError(f"{name} must have lora_A and lora_B, got {', '.join(parts)}")
        for part, tensor in parts.items():
            _check.dtype(f"{name}.{part}", tensor)
        _check.shape(f"{name}.lora_A", parts["lora_A"], ["r", "in"])
        _check.shape(f"{name}.lora_B", parts["lora_B"], ["out", len(parts["lora_A"])])
    return stored
