"""peft's LoRA configs and ours: what means the same on both sides, and what has no counterpart."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from peftkern.qlora import LoraConfig, QLoRALinear

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


def own_config(config: object) -> LoraConfig:
    """Ours, from ours or from peft's `LoraConfig` where that means the same thing.

    Raises:
        TypeError: another kind of object.
        ValueError: a field of peft's that asks for what peftkern does not have.
    """
    if isinstance(config, LoraConfig):
        return config
    kind = type(config)
    if kind.__name__ != "LoraConfig" or kind.__module__.split(".")[0] != "peft":
        raise TypeError(
            f"config must be a LoraConfig of peftkern or of peft, or a tuple, got {kind.__name__}"
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


def of_module(config: LoraConfig, name: str) -> LoraConfig:
    """The config of the module of this name; of several patterns the first that fits wins."""
    return replace(
        config,
        r=_of_pattern(config.rank_pattern, name, config.r),
        lora_alpha=_of_pattern(config.alpha_pattern, name, config.lora_alpha),
        rank_pattern={},
        alpha_pattern={},
    )


def _of_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", name)), default)


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


def of_layer(config: LoraConfig, name: str, layer: QLoRALinear) -> LoraConfig:
    """A file's config for a layer that is there: with the layer's own rank, at the file's scale."""
    own = of_module(config, name)
    lora_alpha = own.scaling * (math.sqrt(layer.r) if own.use_rslora else layer.r)
    return own if own.r == layer.r else replace(own, r=layer.r, lora_alpha=lora_alpha)


def common(layers: Iterable[QLoRALinear]) -> tuple[int, float, bool]:
    """r, alpha and use_rslora as most layers have them: what a config says outside its patterns."""
    layers = list(layers)
    rslora = all(layer.use_rslora for layer in layers)
    ranks = Counter(map(rank, layers))
    alphas = Counter(alpha(layer, rslora) for layer in layers)
    return ranks.most_common(1)[0][0], alphas.most_common(1)[0][0], rslora


def rank(layer: QLoRALinear) -> int:
    """In a file, where what is taken off again is part of the adapter."""
    return layer.r if layer.initial_A is None else 2 * layer.r


def alpha(layer: QLoRALinear, rslora: bool) -> float:
    """The lora_alpha that gives this layer its scale; one file holds one value of use_rslora."""
    r = rank(layer)
    value = layer.scaling * (math.sqrt(r) if rslora else r)
    if layer.use_rslora == rslora and r == layer.r:
        value = layer.lora_alpha
    return int(value) if value == int(value) else value


def to_file(
    layers: dict[str, QLoRALinear], other_names: Iterable[str], base: str | None
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
