"""Puts adapters into a model that start from what a calibration run shows of the layers' inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from peftkern import _check, _folder, _peft, _select
from peftkern.adapt import Plan, place, plan
from peftkern.qlora import init
from peftkern.qlora.frozen import base_of
from peftkern.qlora.placing import as_linear, features

Model = TypeVar("Model", bound=nn.Module)

MODES, METRICS = ("ipm", "kpm"), ("corda", "whitened")


def corda(
    model: Model,
    config: object,
    run: Callable[[], object],
    mode: str = "ipm",
    metric: str = "corda",
    memory: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Model:
    """`adapt`, with A and B from the weight's decomposition under C, the sum of x x^T.

    Yang et al., CorDA (2024); `qlora.init.corda` has the equation. Every token of the run counts
    alike, however they lie in batches. In place, and all or nothing as `adapt` is: the run, its
    numbers and the decompositions are through before the first module changes.

    Args:
        model: as for `adapt`. It runs in eval mode and without gradients, and gets its modes back.
        config: a `LoraConfig`, of ours or of peft, with `init_lora_weights="corda"`.
        run: puts the calibration data through the model, 256 texts of 2,048 tokens in the paper;
            what it returns is ignored.
        mode: "ipm" adapts the directions that the data uses most, for speed and quality on its
            task; "kpm" those that it uses least, so that what the data is about is kept.
        metric: "corda" decomposes W C, as the paper does; "whitened" W L with C = L L^T, of whose
            truncation the outputs suffer least.
        memory: bytes that C may take at a time, 4 in^2 for a layer; `run` is called once for each
            group of layers that fits. None: all layers in one.
        cache: a folder for C, a file a layer. What is there is taken and not computed, so that
            other ranks and modes need no run; it must come from the same model and data.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: as `adapt`; and an unknown mode or metric, a layer whose inputs are
            not finite or that the run does not reach, a cache that does not fit.
    """
    own = _peft.own_config(config)
    if (start := getattr(own, "init_lora_weights", None)) != "corda":
        raise ValueError(f"init_lora_weights must be 'corda', got {start!r}")
    for name, value, known in (("mode", mode, MODES), ("metric", metric, METRICS)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
    planned = plan(model, [own])
    _decompose(model, planned, run, mode, metric, memory, cache)
    place(model, planned)
    return model


def _decompose(
    model: nn.Module, planned: Plan, run: Callable[[], object], mode: str, metric: str,
    memory: int | None, cache: str | os.PathLike[str] | None,
) -> None:  # fmt: skip
    """Gives the plan its factors."""
    targets = {target.name: target for target in planned.targets}
    modules = {name: target.module for name, target in targets.items()}
    for group in _groups(modules, memory):
        for name, moment in _moments(model, group, run, cache).items():
            weight = base_of(as_linear(group[name]))
            targets[name].start = init.corda(weight, moment, targets[name].config, mode, metric)


def _groups(targets: dict[str, nn.Module], memory: int | None) -> Iterator[dict[str, nn.Module]]:
    """In the model's order; a layer that is too large for the memory goes alone."""
    group: dict[str, nn.Module] = {}
    taken = 0
    for name, module in targets.items():
        needed = 4 * features(module)[1] ** 2
        if group and memory is not None and taken + needed > memory:
            yield group
            group, taken = {}, 0
        group[name] = module
        taken += needed
    yield group


def _moments(
    model: nn.Module,
    group: dict[str, nn.Module],
    run: Callable[[], object],
    cache: str | os.PathLike[str] | None,
) -> dict[str, Tensor]:
    """C of every layer, from the cache where it is there."""
    files = {n: Path(cache) / f"{quote(n, safe='')}.safetensors" for n in group} if cache else {}
    found = {n: _read(file, n, group[n]) for n, file in files.items() if file.exists()}
    missing = {n: module for n, module in group.items() if n not in found}
    if missing:
        new = _measure(model, missing, run)
        for name, moment in new.items():
            if name in files and torch.isfinite(moment).all():
                files[name].parent.mkdir(parents=True, exist_ok=True)
                content = safetensors.torch.save({"moment": moment.cpu()}, {"format": "pt"})
                _folder.replace(files[name], content)
        found |= new
    for name, moment in found.items():
        if not torch.isfinite(moment).all():
            raise ValueError(f"inputs must be finite, got NaN or infinity into {name}")
    return {name: found[name] for name in group}


def _read(file: Path, name: str, module: nn.Module) -> Tensor:
    try:
        moment = safetensors.torch.load_file(file)["moment"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} must hold what corda has written, got {error!r}") from error
    width = features(module)[1]
    _check.dtype(name, moment)
    _check.shape(f"the cached moment of {name}", moment, [width, width])
    return moment


def _measure(
    model: nn.Module, modules: dict[str, nn.Module], run: Callable[[], object]
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = next(iter((*args, *kwargs.values()))).detach()
            rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
            with torch.autocast(rows.device.type, enabled=False):
                if name in sums:
                    sums[name].addmm_(rows.t(), rows)
                elif len(rows):
                    sums[name] = rows.t() @ rows

        return add

    modes = {module: module.training for module in model.modules()}
    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        model.eval()
        for module in model.modules():
            if _select.is_a(module, "bitsandbytes", "Linear4bit"):
                module.training = True  # in eval mode, on a CPU, it repacks its weight for good
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if silent := [name for name in modules if name not in sums]:
        raise ValueError(f"run must reach every adapted layer, got none into {', '.join(silent)}")
    return sums
