"""Saves and loads adapters, in peft's two files and under peft's names."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peftkern import _check, _peft
from peftkern.adapt import adapters, place, plan
from peftkern.qlora import LoraConfig, QLoRALinear

Model = TypeVar("Model", bound=nn.Module)

CONFIG, TENSORS, NEW = "adapter_config.json", "adapter_model.safetensors", ".new"
PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What `save_adapter` writes.

    Args:
        model: adapted.

    Returns:
        `base_model.model.<name>.lora_A.weight` `[r, in]` and `….lora_B.weight` `[out, r]` of every
        adapted linear, detached, in the parameters' own storage.

    Raises:
        ValueError: the model has no adapter.
    """
    return {
        f"{PREFIX}{name}.{part}.weight": getattr(layer, part).detach()
        for name, layer in _adapters(model).items()
        for part in ("lora_A", "lora_B")
    }


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a folder that `load_adapter` and peft's `PeftModel.from_pretrained` read.

    All or nothing: killed at any moment, it leaves the adapter that was there, or the new one.
    One process may write to a path at a time.

    Args:
        model: adapted.
        path: a folder, made where it is missing; its other files are left alone.

    Raises:
        ValueError: the model has no adapter.
    """
    model = _unwrapped(model)
    layers = _adapters(model)
    others = [name for name, _ in model.named_modules() if name not in layers]
    content = _peft.to_file(layers, others, getattr(model, "name_or_path", None) or None)
    tensors = {k: v.cpu().contiguous() for k, v in adapter_state_dict(model).items()}
    _write(
        Path(path),
        json.dumps(content, indent=2, sort_keys=True).encode() + b"\n",
        safetensors.torch.save(tensors, {"format": "pt"}),
    )


def load_adapter(model: Model, path: str | os.PathLike[str]) -> Model:
    """Reads what `save_adapter` or peft has written into a model, which then computes the same.

    In place, and all or nothing: names, shapes and dtypes are checked before anything changes.

    Args:
        model: has an adapter in the very same places, or none at all, and then gets one there on
            its base as it is. Parameters keep their dtype and their dropout.
        path: the folder.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is truncated, corrupt or foreign, does not fit the model, or asks for
            what peftkern does not have; or the model is merged.
        TypeError: a tensor is not float.
    """
    inner = _unwrapped(model)
    content, tensors = _read(Path(path))
    pairs = _pairs(tensors)
    config = _peft.from_file(content, pairs)
    for name, (a, _) in pairs.items():
        if (r := _peft.of_module(config, name).r) != len(a):
            raise ValueError(f"{name}.lora_A must have {r} rows as {CONFIG} says, got {len(a)}")
    if not adapters(inner):
        _place(inner, pairs, config)
    layers = adapters(inner)
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(
            f"model must be unmerged before it loads an adapter, got merged {_listed(merged)}"
        )
    _check_fit(pairs, {name: _shapes(layer) for name, layer in layers.items()})
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            layers[name].lora_A.copy_(a)
            layers[name].lora_B.copy_(b)
            layers[name].rescale(_peft.of_module(config, name))
    return model


def _adapters(model: nn.Module) -> dict[str, QLoRALinear]:
    if not (layers := adapters(_unwrapped(model))):
        raise ValueError("model must have an adapter (peftkern.adapt puts one in), got none")
    return layers


def _unwrapped(model: nn.Module) -> nn.Module:
    """torch.compile and DistributedDataParallel put one more name in front of every other."""
    while (name := type(model).__name__) in ("OptimizedModule", "DistributedDataParallel"):
        model = model.get_submodule("_orig_mod" if name == "OptimizedModule" else "module")
    return model


def _shapes(layer: QLoRALinear) -> tuple[list[int], list[int]]:
    return list(layer.lora_A.shape), list(layer.lora_B.shape)


def _place(model: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], config: LoraConfig) -> None:
    planned = plan(model, [config])
    if planned.skipped:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in planned.skipped)
        raise ValueError(f"{TENSORS} must fit the model, got modules that cannot: {reasons}")
    fits = {}
    for module, (name, own) in planned.modules.items():
        assert isinstance(module, nn.Linear)  # what else there is takes a config with a base alone
        fits[name] = ([own.r, module.in_features], [module.out_features, own.r])
    _check_fit(pairs, fits)
    place(model, planned)


def _check_fit(
    pairs: dict[str, tuple[Tensor, Tensor]], places: dict[str, tuple[list[int], list[int]]]
) -> None:
    for title, names in (
        ("the model has no such adapter", pairs.keys() - places.keys()),
        ("the file lacks them", places.keys() - pairs.keys()),
    ):
        if names:
            raise ValueError(
                f"{TENSORS} must hold the model's adapters, got {title}: {_listed(names)}"
            )
    for name, have in pairs.items():
        for part, tensor, want in zip("AB", have, places[name], strict=True):
            _check.shape(f"{name}.lora_{part}", tensor, want)


def _listed(names: Any) -> str:
    first = sorted(names)
    return ", ".join(first[:8]) + (f" and {len(first) - 8} more" if len(first) > 8 else "")


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every module, checked against each other."""
    parts: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        if match := KEY.fullmatch(key):
            parts.setdefault(match[1], {})[match[2]] = tensor
        else:
            foreign.append(key)
    if foreign or not parts:
        raise ValueError(
            f"{TENSORS} must hold {PREFIX}<name>.lora_A.weight and lora_B.weight alone, "
            f"got {_listed(foreign) or 'nothing'}"
        )
    for name, pair in parts.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{name} must have lora_A and lora_B, got lora_{''.join(pair)}")
        for part, tensor in pair.items():
            _check.dtype(f"{name}.lora_{part}", tensor)
        _check.shape(f"{name}.lora_A", pair["A"], ["r", "in"])
        _check.shape(f"{name}.lora_B", pair["B"], ["out", len(pair["A"])])
    return {name: (pair["A"], pair["B"]) for name, pair in parts.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The pair that counts: where a save was killed after its commit, that of the new files."""
    committed = (path / (CONFIG + NEW)).exists()
    config = path / (CONFIG + NEW if committed else CONFIG)
    tensors = path / (TENSORS + NEW)
    if not (committed and tensors.exists()):
        tensors = path / TENSORS
    for file in (config, tensors):
        if not file.is_file():
            raise FileNotFoundError(
                f"path must be a folder with {CONFIG} and {TENSORS}, got {path}"
            )
    try:
        content = json.loads(config.read_bytes())
    except ValueError as error:
        raise ValueError(f"{config.name} must be JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config.name} must hold an object, got {type(content).__name__}")
    try:
        with safe_open(tensors, "pt") as file:
            return content, {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{tensors.name} must be a whole safetensors file, got {error}") from error


def _write(path: Path, config: bytes, tensors: bytes) -> None:
    """Two files cannot be replaced in one step, so the new pair is complete before it counts.

    It counts from the moment `adapter_config.json.new` is there (`_read` knows); `_finish` moves it
    to its names, at once or before the next save. Where the config stays the same, as in most
    saves, the tensors are replaced in one step.
    """
    path.mkdir(parents=True, exist_ok=True)
    _finish(path)
    (path / (TENSORS + NEW)).unlink(missing_ok=True)  # of a save that was killed before it counted
    if (path / CONFIG).is_file() and (path / CONFIG).read_bytes() == config:
        _replace(path / TENSORS, tensors)
        return
    _replace(path / (TENSORS + NEW), tensors)
    _replace(path / (CONFIG + NEW), config)
    _finish(path)


def _finish(path: Path) -> None:
    """The config goes first: between the steps, peft finds none rather than one that lies."""
    if (path / (CONFIG + NEW)).exists():
        (path / CONFIG).unlink(missing_ok=True)
        if (path / (TENSORS + NEW)).exists():
            os.replace(path / (TENSORS + NEW), path / TENSORS)
            _sync(path)  # the config must not be there before them, a power cut included
        os.replace(path / (CONFIG + NEW), path / CONFIG)
        _sync(path)


def _replace(file: Path, content: bytes) -> None:
    """In one step, once the content is on the disk."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)
    _sync(file.parent)


def _sync(folder: Path) -> None:
    """Renames reach the disk with their folder; Windows has no way to ask for that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
