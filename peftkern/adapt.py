"""Puts adapters into a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from peftkern import _peft, _select, _siblings
from peftkern.qlora import LoraConfig, QLoRALinear, QuantizedWeight
from peftkern.qlora.frozen import base_of
from peftkern.qlora.init import Factors

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
    """What will be put where; made without touching the model.

    Args:
        modules: their names and their own configs.
        factors: A and B to start from, by name, where their config does not make them.
        skipped: what stays as it is.
    """

    modules: dict[nn.Module, tuple[str, LoraConfig]] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def adapt(model: Model, config: object) -> Model:
    """Puts an adapter beside every linear that the config names, and freezes everything else.

    In place, and all or nothing: what can be refused is refused before anything changes. Only
    where memory runs out while weights are quantised or, of a `Conv1D`, turned round, the layers
    done by then stay, since what they replaced is gone; the same call then does the rest. At no
    time are both forms of more than one weight there.

    Adapters that are there already stay as they are, trainable. A module that stands in several
    places gets one adapter, and a weight that several modules share stays shared, so it is not
    quantised; `report(model)` lists that and all that was left out.

    Args:
        model: holds `nn.Linear`, bitsandbytes' `Linear4bit`, its `Linear8bitLt` with a threshold of
            0, or transformers' `Conv1D`, whose weight becomes one in the order of `nn.Linear`.
        config: a `LoraConfig`, of ours or of peft where it means the same thing, or a tuple of
            them, applied in order.

    Returns:
        The same model.

    Raises:
        TypeError: `config` is something else.
        ValueError: a config names nothing that fits, or asks for what peftkern does not have; or
            DistributedDataParallel wraps the model already.
    """
    _select.refuse_wrapped(model)
    configs = [_peft.own_config(c) for c in (config if isinstance(config, tuple) else (config,))]
    if not configs:
        raise ValueError("config must hold at least one config, got ()")
    if any(c.start == "corda" for c in configs):
        raise ValueError("init_lora_weights 'corda' must come through peftkern.corda, got no data")
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
    dora = {c.use_dora for c in configs} | {m.use_dora for m in adapters(model).values()}
    if len(dora) > 1:
        raise ValueError("use_dora must be the same for every adapter of a model, got both")
    names, owners = _select.names(model), _select.owners(model)
    for config in configs:
        before, skipped = len(result.modules), len(result.skipped)
        special = _select.heads_and_routers(model) if config.target_modules == "all-linear" else {}
        for module, places in names.items():
            if not any(_select.named(module, name, config) for name in places):
                continue
            name, weight = places[0], module._parameters.get("weight")
            tied = [other for other in owners.get(id(weight), ()) if other != name]
            own = _peft.of_module(_unquantised(config) if tied else config, name)
            if module in result.modules:
                reason: str | None = "has an adapter already"
            else:
                reason = special.get(module) or _select.obstacle(model, module, places, own, tied)
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


def _unquantised(config: LoraConfig) -> LoraConfig:
    """For a weight that stays as it is; then LoftQ has nothing to make up for."""
    start = True if config.start == "loftq" else config.init_lora_weights
    return replace(config, base=None, init_lora_weights=start)


def place(model: nn.Module, plan: Plan) -> None:
    """Carries the plan out, and empties it so that it holds on to no weight.

    Layers are built and put in one by one, those that share their weight first. So there is never
    more than one weight both as it was and as it will be; and until one is given up, whatever
    fails is undone.
    """
    todo = sorted(plan.modules.items(), key=lambda item: _copies(item[0], item[1][1]))
    plan.modules.clear()
    places = parents(model)
    undo: list[Callable[[], object]] | None = []
    try:
        while todo:
            module, (name, config) = todo.pop(0)
            if undo is not None:
                undo += [partial(p.requires_grad_, p.requires_grad) for p in module.parameters()]
            layer = _build(module, config, plan.factors.get(name))
            for parent, attribute in places[id(module)]:
                if undo is not None:
                    undo.append(partial(parent._modules.__setitem__, attribute, module))
                parent._modules[attribute] = layer
            if _copies(module, config):
                undo = None
    except BaseException:
        for step in undo or ():
            step()
        raise
    _freeze(model)
    _siblings.connect(model, lambda module: isinstance(module, QLoRALinear))
    before: tuple[Skipped, ...] = getattr(model, "_peftkern_skipped", ())
    model._peftkern_skipped = (*before, *plan.skipped)  # type: ignore[assignment]


def parents(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For every module, by id, those that it is a child of, and its name there."""
    found = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            found[id(child)].append((parent, name))
    return found


def keep_hooks(module: nn.Module, instead: nn.Module) -> None:
    """The dictionaries themselves, which the handles of the hooks refer to."""
    for hooks in HOOKS:
        setattr(instead, hooks, getattr(module, hooks))


def _copies(module: nn.Module, config: LoraConfig) -> bool:
    """Whether the layer in this module's place has a weight of its own."""
    if isinstance(base_of(module), QuantizedWeight):
        return False
    return config.base is not None or _select.is_transposed(module)


def as_linear(module: nn.Module) -> nn.Module:
    """The module, or of a `Conv1D` one whose weight is the same seen the other way round."""
    if not _select.is_a(module, "transformers", "Conv1D"):
        return module
    assert isinstance(module.weight, Tensor)
    linear = nn.Module()
    linear.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)
    linear.bias = module.bias
    linear.training = module.training
    return linear


def _build(module: nn.Module, config: LoraConfig, factors: Factors | None) -> QLoRALinear:
    layer = QLoRALinear.from_config(as_linear(module), config, factors)
    keep_hooks(module, layer)
    return layer


def _freeze(model: nn.Module) -> None:
    """All but adapters, peft's among them."""
    kept: set[int] = set()
    for module in model.modules():
        if isinstance(module, QLoRALinear):
            kept |= {id(p) for p in module.adapter()}
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
