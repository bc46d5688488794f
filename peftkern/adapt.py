"""Puts adapters into a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor, nn

from peftkern import _peft, _select
from peftkern.qlora import LoraConfig, QLoRALinear, quantize

Model = TypeVar("Model", bound=nn.Module)

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


@dataclass(frozen=True)
class Skipped:
    """What `adapt` or `optimize` left as it is, though a config named it, or would name it.

    Args:
        name: of the module, or a pattern that names none.
        reason: why.
    """

    name: str
    reason: str


@dataclass
class Plan:
    """What will be put where; made without touching the model."""

    modules: dict[nn.Module, tuple[str, LoraConfig]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def adapt(model: Model, config: object) -> Model:
    """Puts an adapter beside every linear that the config names, and freezes everything else.

    In place, and all or nothing. Adapters that are there already stay as they are, trainable. A
    module that stands in several places gets one adapter, and a weight that several modules share
    stays shared, so it is not quantised; `report(model)` lists that and all that was left out.

    Args:
        model: holds `nn.Linear`, bitsandbytes' `Linear4bit` or, where the config quantises its
            base, transformers' `Conv1D`.
        config: a `LoraConfig`, of ours or of peft where it means the same thing, or a tuple of
            them, applied in order.

    Returns:
        The same model.

    Raises:
        TypeError: `config` is something else.
        ValueError: a config names nothing that fits, or asks for what peftkern does not have.
    """
    configs = [_peft.own_config(c) for c in (config if isinstance(config, tuple) else (config,))]
    if not configs:
        raise ValueError("config must hold at least one config, got ()")
    place(model, plan(model, configs))
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimiser gets: every parameter that takes a gradient.

    Args:
        model: adapted or not.

    Returns:
        The parameters, each once, in the model's order.
    """
    return [p for p in model.parameters() if p.requires_grad]


def adapters(model: nn.Module) -> dict[str, QLoRALinear]:
    """Every adapted linear by its name; one that stands in several places by the first."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QLoRALinear)}


def plan(model: nn.Module, configs: Sequence[LoraConfig]) -> Plan:
    """Raises ValueError where a config names nothing that fits."""
    result = Plan()
    names, owners = _select.names(model), _select.owners(model)
    for config in configs:
        before, skipped = len(result.modules), len(result.skipped)
        special = _select.heads_and_routers(model) if config.target_modules == "all-linear" else {}
        for module, places in names.items():
            if not any(_select.named(module, name, config) for name in places):
                continue
            name, weight = places[0], module._parameters.get("weight")
            tied = [other for other in owners.get(id(weight), ()) if other != name]
            own = _peft.of_module(replace(config, base=None) if tied else config, name)
            if module in result.modules:
                reason: str | None = "has an adapter already"
            else:
                reason = special.get(module) or _select.obstacle(model, module, places, own)
            if reason is None:
                result.modules[module] = (name, own)
                if tied and config.base is not None:
                    reason = f"its base is not quantised, since its weight is tied to {tied[0]}"
            if reason is not None:
                result.skipped.append(Skipped(name, reason))
        result.skipped += [
            Skipped(ending, "names no module") for ending in _select.unmatched(config, names)
        ]
        if len(result.modules) == before:
            raise ValueError(_nothing(config, names, result.skipped[skipped:]))
    return result


def place(model: nn.Module, plan: Plan) -> None:
    """Carries the plan out: everything that can fail happens before the first module is swapped."""
    trainable = trainable_parameters(model)
    try:
        layers = {module: _build(module, config) for module, (_, config) in plan.modules.items()}
    except BaseException:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if child in layers:
                parent._modules[attribute] = layers[child]
    _freeze(model)
    before: tuple[Skipped, ...] = getattr(model, "_peftkern_skipped", ())
    model._peftkern_skipped = (*before, *plan.skipped)  # type: ignore[assignment]


def _build(module: nn.Module, config: LoraConfig) -> QLoRALinear:
    if _select.is_a(module, "transformers", "Conv1D"):
        assert isinstance(module.weight, Tensor) and config.base is not None
        base = quantize(module.weight.t(), config.base, config.block_size, config.nested)
        layer = QLoRALinear(base, module.bias, config).train(module.training)  # type: ignore[arg-type]
    else:
        layer = QLoRALinear.from_config(module, config)
    for hooks in HOOKS:  # the dictionaries themselves, which the handles of the hooks refer to
        setattr(layer, hooks, getattr(module, hooks))
    return layer


def _freeze(model: nn.Module) -> None:
    """All but adapters, peft's among them."""
    kept: set[int] = set()
    for module in model.modules():
        if isinstance(module, QLoRALinear):
            kept |= {id(module.lora_A), id(module.lora_B)}
        elif _select.is_a(module, "peft", "BaseTunerLayer"):
            kept |= {id(p) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def _nothing(config: LoraConfig, names: dict[nn.Module, list[str]], skipped: list[Skipped]) -> str:
    reasons = dict.fromkeys(f"{_select.starred(s.name)}: {s.reason}" for s in skipped)
    return (
        "target_modules must name a linear that can take an adapter, got "
        f"{config.target_modules!r}; linears there: {', '.join(_select.linears(names)) or 'none'}"
        + (f"; left out: {'; '.join(reasons)}" if reasons else "")
    )
