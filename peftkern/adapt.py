"""Puts adapters into a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from torch import nn

from peftkern import _family, _peft, _select, _siblings
from peftkern._family import Adapter, Config, Places, Target, Undo
from peftkern.onebit import pair

Model = TypeVar("Model", bound=nn.Module)


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
        targets: the places, each with its own config.
        skipped: what stays as it is.
    """

    targets: list[Target] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def adapt(model: Model, config: object) -> Model:
    """Puts an adapter wherever the config names a place for one, and freezes everything else.

    In place, and all or nothing: what can be refused is refused before anything changes. Only
    where memory runs out while weights are quantised or, of a `Conv1D`, turned round, the layers
    done by then stay, since what they replaced is gone; the same call then does the rest. At no
    time are both forms of more than one weight there.

    Adapters that are there already stay as they are, trainable. A module that stands in several
    places gets one adapter, and a weight that several modules share stays shared, so it is not
    quantised; `report(model)` lists that and all that was left out.

    Args:
        model: of any modules; what a config needs of it, its class says. A linear is an
            `nn.Linear`, bitsandbytes' `Linear4bit`, its `Linear8bitLt` with a threshold of 0, or
            transformers' `Conv1D`, whose weight becomes one in the order of `nn.Linear`.
        config: one of ours, or a `LoraConfig` of peft where it means the same thing, or a tuple of
            them, applied in order.

    Returns:
        The same model.

    Raises:
        TypeError: `config` is something else.
        ValueError: a config names nothing that fits, or asks for what peftkern does not have; or
            DistributedDataParallel wraps the model already.
    """
    _select.refuse_wrapped(model)
    given = config if isinstance(config, tuple) else (config,)
    configs = [own for one in given for own in _peft.own_config(one).configs()]
    if not configs:
        raise ValueError("config must hold at least one config, got ()")
    if any(getattr(own, "start", None) == "corda" for own in configs):
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


def plan(
    model: nn.Module, configs: Sequence[Config], only: Sequence[Collection[str]] | None = None
) -> Plan:
    """Raises ValueError where a config names nothing that fits.

    Args:
        model: as it is before.
        configs: applied in order.
        only: of each config, the names of the adapters that it may put in; None for all, and then
            each must put one in.
    """
    result = Plan()
    taken: set[tuple[nn.Module, str]] = set()
    inside = _family.inside(model)
    for config in configs:
        config.check(model, configs)
    for i, config in enumerate(configs):
        before, skipped = len(result.targets), len(result.skipped)
        for target in config.targets(model):
            if target.module in inside or only and target.layer_name not in only[i]:
                continue
            key = (target.module, target.slot)
            reason = "has an adapter already" if key in taken else target.obstacle(model)
            if reason is None:
                taken.add(key)
                result.targets.append(target)
                reason = target.remark()
            if reason is not None:
                result.skipped.append(Skipped(target.name, reason))
        there = [name for places in _select.names(model).values() for name in places]
        result.skipped += [Skipped(end, "names no module") for end in config.unmatched(there)]
        if only is None and len(result.targets) == before:
            reasons = (f"{_select.starred(s.name)}: {s.reason}" for s in result.skipped[skipped:])
            left_out = "; ".join(dict.fromkeys(reasons))
            raise ValueError(config.nothing(model) + f"; left out: {left_out}" * bool(left_out))
        shared = config.share(result.targets[before:])
        for target in result.targets[before:]:
            target.shared = shared
    return result


def place(model: nn.Module, plan: Plan) -> None:
    """Carries the plan out, and empties it so that it holds on to no weight.

    Layers are built and put in one by one, those that share their weight first. So there is never
    more than one weight both as it was and as it will be; and until one is given up, whatever
    fails is undone.
    """
    todo = sorted(plan.targets, key=lambda target: target.order)
    plan.targets.clear()
    places = parents(model)
    undo: list[Undo] | None = []
    try:
        while todo:
            target = todo.pop(0)
            _put(target, model, places, undo)
            if target.final:
                undo = None
    except BaseException:
        for step in reversed(undo or ()):
            step()
        raise
    _freeze(model)
    _siblings.connect(model)
    pair.connect(model)
    before: tuple[Skipped, ...] = getattr(model, "_peftkern_skipped", ())
    model._peftkern_skipped = (*before, *plan.skipped)  # type: ignore[assignment]


def _put(target: Target, model: nn.Module, places: Places, undo: list[Undo] | None) -> None:
    if undo is not None:
        undo += [partial(p.requires_grad_, p.requires_grad) for p in target.module.parameters()]
    for step in target.put(model, places):
        if undo is not None:
            undo.append(step)


def parents(model: nn.Module) -> Places:
    """For every module, by id, those that it is a child of, and its name there."""
    found = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            found[id(child)].append((parent, name))
    return found


def _freeze(model: nn.Module) -> None:
    """All but adapters, peft's among them."""
    kept: set[int] = set()
    for module in model.modules():
        if isinstance(module, Adapter):
            kept |= {id(p) for p in module.trained()}
        elif _select.is_a(module, "peft", "BaseTunerLayer"):
            kept |= {id(p) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
