"""peft's LoRA configs and files, and ours: what means the same on both sides, and what does not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import Tensor

from peftkern import _check
from peftkern._family import Config, Parts
from peftkern._folder import CONFIG, TENSORS
from peftkern._stored import Stored
from peftkern.qlora import LoraConfig
from peftkern.qlora.described import LoraAdapter, alpha, common, rank

# The fields with one meaning, and what they are in a file.
SAME: dict[str, Any] = {
    "r": int, "lora_alpha": (int, float), "lora_dropout": (int, float), "use_rslora": bool,
    "use_dora": bool, "rank_pattern": dict, "alpha_pattern": dict,
}  # fmt: skip
# What they say concerns peft's own loading and saving, or methods that are refused by name.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# In a file, what makes an adapter compute something else; other keys may come and go with peft.
REFUSED_IN_A_FILE = (
    "lora_bias", "modules_to_save", "alora_invocation_tokens", "use_qalora",
    "layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora",
    "arrow_config", "kasa_config",
)  # fmt: skip
# Those of peft's that leave the base alone; a file with another belongs to a base of its own.
INITS_OF_A_AND_B = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

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


def own_config(config: object) -> Config:
    """Ours, from ours or from peft's `LoraConfig` where that means the same thing.

    Raises:
        TypeError: another kind of object.
        ValueError: a field of peft's that asks for what peftkern does not have.
    """
    if isinstance(config, Config):
        return config
    kind = type(config)
    if kind.__name__ != "LoraConfig" or kind.__module__.split(".")[0] != "peft":
        raise TypeError(
            "config must be one of peftkern's, a LoraConfig of peft, or a tuple of them, got "
            f"{kind.__name__}"
        )
    values = {f.name: getattr(config, f.name) for f in fields(config)}  # type: ignore[arg-type]
    default = kind()
    read = {*SAME, "target_modules", "exclude_modules", "init_lora_weights", "bias", "loftq_config"}
    for name, value in values.items():
        if name in read or name in WITHOUT_EFFECT:
            continue
        if value != (neutral := getattr(default, name)):
            raise ValueError(f"{name} must be {neutral!r} for peftkern, got {value!r}")
    if values["target_modules"] is None:
        raise ValueError(
            "target_modules must be given (peft's table of architectures is its own), got None"
        )
    return LoraConfig(
        **{name: values[name] for name in SAME},
        **_start(values["init_lora_weights"], values["loftq_config"]),
        bias=values["bias"],
        target_modules=_modules(values["target_modules"]),
        exclude_modules=_modules(values["exclude_modules"] or ()),
    )


def _start(init: Any, loftq: dict[str, Any]) -> dict[str, Any]:
    """The fields of ours that say how A and B start. peft's LoftQ brings its base along."""
    if init == "orthogonal":
        raise ValueError(
            "init_lora_weights must mean the same in peft and in peftkern, got 'orthogonal': in "
            "peft both factors are random and train, here B is zero and A frozen"
        )
    if init != "loftq":
        return {"init_lora_weights": init}
    if (bits := loftq.get("loftq_bits", 4)) != 4:
        raise ValueError(f"loftq_config must have loftq_bits 4 for peftkern, got {bits}")
    rounds = loftq.get("loftq_iter", 1)
    return {"init_lora_weights": f"loftq_{rounds}", "base": "nf4", "nested": False}


def _modules(value: str | Iterable[str]) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return "all-linear" if value.lower() == "all-linear" else value
    return tuple(sorted(value))


def from_file(content: dict[str, Any], names: Iterable[str]) -> LoraConfig:
    """The config that an adapter_config.json holds, for exactly these modules.

    Raises:
        ValueError: it is no LoRA, a field is missing, or one asks for what peftkern does not have.
    """
    if content.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be 'LORA', got {content.get('peft_type')!r}")
    for name in REFUSED_IN_A_FILE:
        if content.get(name):
            raise ValueError(f"{name} must not be set for peftkern, got {content[name]!r}")
    if (bias := content.get("bias", "none")) not in ("none", "lora_only"):
        raise ValueError(f"bias must be 'none' or 'lora_only' for peftkern, got {bias!r}")
    init = content.get("init_lora_weights")
    if init not in INITS_OF_A_AND_B:
        raise ValueError(f"init_lora_weights must not change the base, got {init!r}")
    for name, kinds in SAME.items():
        value = content.get(name)
        entries = value.values() if isinstance(value, dict) and kinds is dict else ()
        if not isinstance(value, kinds) or not all(isinstance(v, (int, float)) for v in entries):
            if value is not None or name in ("r", "lora_alpha"):
                raise ValueError(f"{name} must be given as peft writes it, got {value!r}")
    return LoraConfig(
        **{name: content[name] for name in SAME if content.get(name) is not None},
        bias=bias,
        target_modules="|".join(map(re.escape, names)),
    )


def read(content: dict[str, Any], tensors: dict[str, Tensor]) -> Stored:
    """What both files hold.

    Raises:
        TypeError, ValueError: one is foreign, or they do not fit each other.
    """
    stored = _checked(tensors)
    config = from_file(content, stored)
    own = {name: config.of_module(name) for name in stored}
    for name, parts in stored.items():
        if (r := own[name].r) != (have := len(parts["lora_A"])):
            raise ValueError(f"{name}.lora_A must have {r} rows as {CONFIG} says, got {have}")
        if config.use_dora != ("lora_magnitude_vector" in parts):
            raise ValueError(
                f"{name} must have a lora_magnitude_vector where {CONFIG} says use_dora and only "
                f"there, got {', '.join(parts)} and use_dora {config.use_dora}"
            )
    return Stored(stored, dict(own), [(config, stored)])


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
            f"biases alone, got {_check.listed(foreign) or 'nothing'}"
        )
    for name, parts in stored.items():
        if not {"lora_A", "lora_B"} <= parts.keys():
            raise ValueError(f"{name} must have lora_A and lora_B, got {', '.join(parts)}")
        for part, tensor in parts.items():
            _check.dtype(f"{name}.{part}", tensor)
        _check.shape(f"{name}.lora_A", parts["lora_A"], ["r", "in"])
        _check.shape(f"{name}.lora_B", parts["lora_B"], ["out", len(parts["lora_A"])])
    return stored


def key(name: str, part: str) -> str:
    return f"{PREFIX}{name}.{KEY_OF.get(part, part)}"


def to_file(
    layers: dict[str, LoraAdapter], other_names: Iterable[str], base: str | None
) -> dict[str, Any]:
    """The adapter_config.json of these layers.

    Args:
        layers: by name.
        other_names: the modules without an adapter, which the written names must not match.
        base: the base model's name.
    """
    r, lora_alpha, rslora = common(layers.values())
    exact = {name: f"^{re.escape(name)}" for name in layers}
    alphas = {name: alpha(layer, rslora) for name, layer in layers.items()}
    endings = sorted({name.rpartition(".")[2] for name in layers})
    also_match = any(name.rpartition(".")[2] in endings for name in other_names)
    dropouts = Counter(layer.lora_dropout for layer in layers.values())
    return {
        "alpha_pattern": {exact[n]: a for n, a in alphas.items() if a != lora_alpha},
        "base_model_name_or_path": base,
        "bias": "lora_only" if any(layer.trains_bias for layer in layers.values()) else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": lora_alpha,
        "lora_dropout": dropouts.most_common(1)[0][0],
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {exact[n]: rank(layer) for n, layer in layers.items() if rank(layer) != r},
        "target_modules": sorted(layers) if also_match else endings,
        "task_type": None,
        "use_dora": all(layer.use_dora for layer in layers.values()),
        "use_rslora": rslora,
    }
