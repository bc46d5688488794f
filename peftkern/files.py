"""Saves and loads adapters, in peft's two files; LoRA alone under peft's names too."""

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

from peftkern import _check, _folder, _own, _peft, _select, _sharded
from peftkern._family import Adapter, adapters
from peftkern._folder import CONFIG, TENSORS
from peftkern._stored import Stored, check_fit
from peftkern.adapt import place, plan
from peftkern.qlora.described import LoraAdapter

Model = TypeVar("Model", bound=nn.Module)


def adapter_state_dict(model: nn.Module, latents: bool = False) -> dict[str, Tensor]:
    """What `save_adapter` writes.

    Args:
        model: adapted.
        latents: as there.

    Returns:
        `base_model.model.<name>.lora_A.weight` `[r, in]` and `….lora_B.weight` `[out, r]` of every
        adapted linear, detached, in the parameters' own storage; with DoRA
        `….lora_magnitude_vector` `[out]`, where the bias trains `….base_layer.bias` `[out]`. An
        adapter that takes its start off again is one of rank 2 r, `[A; A0]` and `[B, -B0]`.
        Where another method is in the model, `<name of the layer>.<part>` of every adapter; of a
        1-bit adapter `down.bits` `[r, ceil(in * bits / 8)]`, `up.bits` `[out, ceil(r * bits / 8)]`
        and `statistics` `[2, 2]`, mean and std of each, made now.

    Raises:
        ValueError: the model has no adapter, or is wrapped in FullyShardedDataParallel.
    """
    layers = _adapters(model)
    form = _form(layers)
    return {
        form.key(name, part): tensor
        for name, layer in layers.items()
        for part, tensor in (layer.parts() | (layer.training_parts() if latents else {})).items()
    }


def save_adapter(model: nn.Module, path: str | os.PathLike[str], latents: bool = False) -> None:
    """Writes a folder that `load_adapter` reads, and where all is LoRA, peft's `from_pretrained`.

    Of methods that peft does not have the files are the same two, `peft_type` being "PEFTKERN".

    All or nothing: killed at any moment, it leaves the adapter that was there, or the new one.
    One process may write to a path at a time. However the adapter started, what is written belongs
    to the base as it was before `adapt`; that of "loftq_N" alone, with N above 1, to the quantised
    base that is in the model, and saving it warns.

    Args:
        model: adapted.
        path: a folder, made where it is missing; its other files are left alone.
        latents: of 1-bit adapters, write the float32 weights that training has moved as well, 32
            times as much. From bits alone a model computes the same, and training goes on from
            the same function; but how near each weight had come to a change of sign is lost.

    Raises:
        ValueError: the model has no adapter, or is wrapped in FullyShardedDataParallel.
    """
    model = _unwrapped(model)
    layers = _adapters(model)
    for warning in dict.fromkeys(layer.warning() for layer in layers.values()):
        if warning is not None:
            warnings.warn(warning, stacklevel=2)
    others = [n for name, _ in model.named_modules() if (n := _plain(name)) not in layers]
    content = _form(layers).to_file(layers, others, getattr(model, "name_or_path", None) or None)
    state = adapter_state_dict(model, latents)
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
            what peftkern does not have; or the model is merged, is spread over processes by
            FullyShardedDataParallel, or otherwise and has no adapter yet.
        TypeError: a tensor is not float.
    """
    inner = _unwrapped(model)
    content, tensors = _folder.read(Path(path))
    form = _own if content.get("peft_type") == _own.PEFT_TYPE else _peft
    stored = form.read(content, tensors)
    if not adapters(inner):
        _select.refuse_wrapped(model)
        _place(inner, stored)
    layers = _adapters(inner)
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(
            f"model must be unmerged before it loads an adapter, got merged {_check.listed(merged)}"
        )
    check_fit(TENSORS, stored.parts, {n: layer.wanted() for n, layer in layers.items()})
    for name, layer in layers.items():
        if (reason := layer.misfit(stored.own[name])) is not None:
            raise ValueError(f"{name} must be what {CONFIG} says, got {reason}")
        layer.check(name, stored.parts[name], stored.bases.get(name))
    with torch.no_grad():
        for name, parts in stored.parts.items():
            layers[name].fill(parts)
            layers[name].take(stored.own[name])
    return model


def _form(layers: dict[str, Adapter]) -> Any:
    """The module that knows how these are written: peft's way where peft has the method."""
    return _peft if all(isinstance(m, LoraAdapter) for m in layers.values()) else _own


def _adapters(model: nn.Module) -> dict[str, Adapter]:
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


def _place(model: nn.Module, stored: Stored) -> None:
    configs, names = zip(*stored.configs, strict=True)
    planned = plan(model, configs, names)
    inside = {name.rpartition(".")[0] for name in stored.parts}
    left_out = [s for s in planned.skipped if s.name in stored.parts or s.name in inside]
    if left_out:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in left_out)
        raise ValueError(f"{TENSORS} must fit the model, got modules that cannot: {reasons}")
    fits = {target.layer_name: target.wanted() for target in planned.targets}
    check_fit(TENSORS, stored.parts, fits)
    for target in planned.targets:
        name = target.layer_name
        target.check(name, stored.parts[name], stored.bases.get(name))
    place(model, planned)
