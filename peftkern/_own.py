"""Files of methods that peft does not have: what the two of them hold, LoRA beside others too."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peftkern import _check
from peftkern._family import Adapter, Config, Parts
from peftkern._folder import CONFIG, TENSORS
from peftkern._stored import Stored
from peftkern.bottleneck import BottleneckConfig, PrefixConfig
from peftkern.onebit import OneBitConfig
from peftkern.qlora import LoraConfig
from peftkern.sparse import SparseConfig

PEFT_TYPE, VERSION = "PEFTKERN", 1
CONFIGS: dict[str, type[Config]] = {
    c.method: c for c in (LoraConfig, BottleneckConfig, PrefixConfig, OneBitConfig, SparseConfig)
}
# Of parts that are not float, by their last word.
_DTYPES = {
    "bits": [torch.uint8], "num_batches_tracked": [torch.int64],
    "columns": [torch.uint16, torch.int32], "row_start": [torch.int32, torch.int64],
}  # fmt: skip


def key(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def to_file(
    layers: dict[str, Adapter], other_names: Iterable[str], base: str | None
) -> dict[str, Any]:
    """The adapter_config.json of these layers, by name: a list of configs, each with its layers."""
    groups: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        entry = {"method": layer.method, "config": layer.fields()}
        groups.setdefault(json.dumps(entry, sort_keys=True), {**entry, "modules": []})
        group = groups[json.dumps(entry, sort_keys=True)]
        group["modules"].append(name)
        if (base_hash := layer.base_hash()) is not None:
            group.setdefault("bases", {})[name] = base_hash
    return {
        "adapters": list(groups.values()),
        "base_model_name_or_path": base,
        "peft_type": PEFT_TYPE,
        "version": VERSION,
    }


def read(content: dict[str, Any], tensors: dict[str, Tensor]) -> Stored:
    """What both files hold.

    Raises:
        TypeError, ValueError: one is of another version or corrupt, or they do not fit each other.
    """
    if content.get("version") != VERSION:
        raise ValueError(f"version must be {VERSION} in {CONFIG}, got {content.get('version')!r}")
    own: dict[str, Config] = {}
    bases: dict[str, Any] = {}
    configs = []
    for entry in _entries(content):
        config = _config(entry)
        configs.append((config, entry["modules"]))
        own |= {name: config.of_module(name) for name in entry["modules"]}
        bases |= entry.get("bases", {})
    stored: dict[str, Parts] = {name: {} for name in own}
    foreign = []
    for path, tensor in tensors.items():
        words = path.split(".")
        # The longest: an adapter may stand inside another one's module, or be its child.
        ends = (i for i in reversed(range(len(words))) if ".".join(words[:i]) in own)
        if (end := next(ends, None)) is None:
            foreign.append(path)
            continue
        _check.dtype(path, tensor, _DTYPES.get(words[-1], _check.FLOATS))
        stored[".".join(words[:end])][".".join(words[end:])] = tensor
    if foreign:
        raise ValueError(f"{TENSORS} must hold what {CONFIG} names, got {_check.listed(foreign)}")
    return Stored(stored, own, configs, bases)


def _entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    entries = content.get("adapters")
    kinds = {"method": str, "config": dict, "modules": list}
    if not isinstance(entries, list) or not entries or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in kinds.items())
        and all(isinstance(name, str) for name in entry["modules"])
        and isinstance(entry.get("bases", {}), dict)
        for entry in entries
    ):  # fmt: skip
        raise ValueError(
            f"adapters must be a list of method, config and modules in {CONFIG}, got {entries!r}"
        )
    return entries


def _config(entry: dict[str, Any]) -> Config:
    method = entry["method"]
    if method not in CONFIGS:
        known = ", ".join(CONFIGS)
        raise ValueError(f"method must be one of {known} in {CONFIG}, got {method!r}")
    try:
        return CONFIGS[method].from_fields(entry["config"], entry["modules"])
    except TypeError as error:
        raise ValueError(f"config must be one of {method} in {CONFIG}, got {error}") from error
