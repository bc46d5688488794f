"""The smallest weights of a language model's linears, trained three ways.

SaraAdamW moves them packed; dense AdamW moves as many by a mask on the gradients, which is the same
mathematics, so that both curves have to be one; and LoRA trains as many parameters of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import peftkern
from peftkern.demo import model as language_model
from peftkern.demo import show, text, train
from peftkern.demo.options import SHARE, DemoFailed, Options
from peftkern.demo.train import Recipe, Result
from peftkern.sparse import SaraAdamW, SmallestFraction, gather
from peftkern.sparse.support import supports

OURS, DENSE, LORA = "SaraAdamW", "dense AdamW, masked", "LoRA, as many"
# The largest difference of the first two losses at any step, in nats: sums in another order.
TOLERANCE = 1e-3

# What trains, and by which optimizer.
Placed = tuple[list[nn.Parameter], torch.optim.Optimizer]


def run(options: Options) -> None:
    """Does the work, prints the results and writes them to `options.out`.

    Raises:
        DemoFailed: no model, no text, a perplexity that did not fall, or curves that differ.
    """
    recipe = Recipe() if options.steps is None else Recipe(steps=options.steps)
    path = options.model or language_model.embedded()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    written: dict[str, str] = {}
    facts: dict[str, str] = {}
    for name, place in CONTENDERS.items():  # ours first: LoRA's rank follows from its number
        show.say(f"{name}: reading {path.name}", options.quiet)
        loaded = language_model.load(path, bars=show.bars_wanted(options.quiet))
        model, tokenizer = loaded.model, loaded.tokenizer
        data = text.data(options.text, tokenizer, recipe.length)
        if name == OURS:
            written["before"] = show.sample(model, tokenizer, data.prompt, recipe.seed)
        torch.manual_seed(recipe.seed)
        parameters, optimizer = place(model, recipe, results)
        progress = show.progress(name, recipe.steps, options.quiet)
        sets = data.train, data.held_out
        results[name] = train.run(model, parameters, *sets, recipe, progress, optimizer)
        if name == DENSE:
            count = results[OURS].trainable
            results[name] = replace(results[name], trainable=count)
        if name == OURS:
            written["after"] = show.sample(model, tokenizer, data.prompt, recipe.seed)
            facts = _saved(model, options)
        del loaded, model, parameters, optimizer  # the next one's memory is to be its own
    show.plot(results, options.out / "loss.png")
    _write(options, results, recipe, written)
    show.table(results, recipe, facts)
    for when, sampled in written.items():
        print(f"\nSampled {when}:\n{sampled}")
    print(f"\nWritten to {options.out}: adapter, loss.png, samples.txt, result.json")
    _judge(results)


def linears(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that compete: of all linears but the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        f"{name}.weight": cast(nn.Parameter, module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def threshold_of(weights: dict[str, nn.Parameter]) -> float:
    """Below which that share of them lies."""
    found = SmallestFraction(SHARE).select(weights)
    largest = [gather(weights[n].detach(), p).abs().max() for n, p in found.items() if p.nnz]
    return float(torch.stack(largest).max())


def _packed(model: nn.Module, recipe: Recipe, results: dict[str, Result]) -> Placed:
    weights = linears(model)
    chosen = {id(weight) for weight in weights.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    optimizer = SaraAdamW(model, threshold_of(weights), weight_decay=0.0)
    return [support.values for support in supports(model)], optimizer


def _masked(model: nn.Module, recipe: Recipe, results: dict[str, Result]) -> Placed:
    weights = linears(model)
    below = threshold_of(weights)
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
        hook = _masking(weight.detach().abs() < below)
        weight.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    rate = _packed_rate(below)
    return list(weights.values()), torch.optim.AdamW(weights.values(), lr=rate, weight_decay=0.0)


def _packed_rate(threshold: float) -> float:
    """That of SaraAdamW, which has its own."""
    one = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(one.weight)
    rate: float = SaraAdamW(one, threshold).param_groups[0]["lr"]
    return rate


def _masking(mask: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(mask)

    return hook


def _lora(model: nn.Module, recipe: Recipe, results: dict[str, Result]) -> Placed:
    sides = sum(sum(weight.shape) for weight in linears(model).values())
    r = max(1, round(results[OURS].trainable / sides))
    peftkern.adapt(model, peftkern.LoraConfig(r=r, lora_alpha=2 * r))
    parameters = peftkern.trainable_parameters(model)
    rate = recipe.learning_rate
    return parameters, torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


CONTENDERS: dict[str, Callable[[nn.Module, Recipe, dict[str, Result]], Placed]] = {
    OURS: _packed,
    DENSE: _masked,
    LORA: _lora,
}


def _saved(model: nn.Module, options: Options) -> dict[str, str]:
    from peftkern._folder import TENSORS

    peftkern.save_adapter(model, options.out / "adapter")
    size = (options.out / "adapter" / TENSORS).stat().st_size
    entries = sum(support.pattern.nnz for support in supports(model))
    return {
        "sparse adapter's file": show.megabytes(size),
        "bytes a trained weight": f"{size / entries:.2f}",
    }


def _write(
    options: Options, results: dict[str, Result], recipe: Recipe, written: dict[str, str]
) -> None:
    measured: dict[str, Any] = {name: asdict(result) for name, result in results.items()}
    document = {"recipe": asdict(recipe), "torch": torch.__version__, "results": measured}
    (options.out / "result.json").write_text(json.dumps(document, indent=1) + "\n")
    texts = [f"{when}:\n{sampled}\n" for when, sampled in written.items()]
    (options.out / "samples.txt").write_text("\n".join(texts), encoding="utf-8")


def _judge(results: dict[str, Result]) -> None:
    ours, dense = results[OURS], results[DENSE]
    apart = max(abs(a - b) for a, b in zip(ours.losses, dense.losses, strict=True))
    print(
        f"Packed and dense differ by {apart:.2g} at most (tolerance {TOLERANCE}). Against dense: "
        f"{dense.seconds_per_step / ours.seconds_per_step:.2f}x the speed, "
        f"{ours.peak_memory / dense.peak_memory:.2f}x the peak memory."
    )
    before, after = (train.perplexity(x) for x in (ours.held_out_before, ours.held_out_after))
    if not after < before:
        raise DemoFailed(
            f"held-out perplexity must fall, got {before:.2f} before and {after:.2f} after"
        )
    if not apart <= TOLERANCE:
        raise DemoFailed(f"the loss curves must agree within {TOLERANCE}, got {apart:.4f}")
