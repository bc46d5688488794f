"""The demo from end to end: read, adapt, train, show, save."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

import peftkern
from peftkern._folder import TENSORS
from peftkern.demo import model as language_model
from peftkern.demo import peers, show, text, train
from peftkern.demo.options import METHODS, DemoFailed, Options
from peftkern.demo.train import Recipe, Result

OURS = "peftkern"


def run(options: Options) -> None:
    """Does the work, prints the results and writes them to `options.out`.

    Raises:
        DemoFailed: no model, no text, a perplexity that did not fall, or curves that differ.
    """
    recipe = Recipe() if options.steps is None else Recipe(steps=options.steps)
    path = options.model or language_model.embedded()
    options.out.mkdir(parents=True, exist_ok=True)
    show.say(f"Reading {path.name}", options.quiet)
    loaded = language_model.load(path, bars=show.bars_wanted(options.quiet))
    model, tokenizer = loaded.model, loaded.tokenizer
    data = text.data(options.text, tokenizer, recipe.length)
    show.say("Measuring the model as it is, before and after requantising", options.quiet)
    loss = train.evaluate(model, data.held_out, recipe.batch)
    facts = {
        "held-out perplexity, float32 base": f"{train.perplexity(loss):.2f}",
        "adapted weights, float32": show.megabytes(language_model.linear_bytes(model)),
    }

    config = METHODS[options.method]()
    torch.manual_seed(recipe.seed)
    peftkern.adapt(model, config)
    rows = peftkern.report(model).rows
    adapter = sum(parameter.nbytes for parameter in peftkern.trainable_parameters(model))
    base = config.base if isinstance(config.base, str) else "as they are"
    facts[f"adapted weights, {base}"] = show.megabytes(sum(row.bytes for row in rows) - adapter)
    print(f"Base: {loaded.source}, then requantised to {base}; {len(rows)} linears adapted.")
    if options.compare_peers:
        peftkern.save_adapter(model, options.out / "initial-adapter")

    written = {"before": show.sample(model, tokenizer, data.prompt, recipe.seed)}
    results = _train(model, data, recipe, options, path)
    written["after"] = show.sample(model, tokenizer, data.prompt, recipe.seed)
    peftkern.save_adapter(model, options.out / "adapter")
    size = (options.out / "adapter" / TENSORS).stat().st_size
    facts["adapter's file"] = show.megabytes(size)
    if isinstance(config, peftkern.OneBitConfig):
        facts["LoRA's file, same rank, float32"] = show.megabytes(adapter)

    show.plot(results, options.out / "loss.png")
    _write(options.out, results, recipe, written)
    show.table(results, recipe, facts)
    for when, sampled in written.items():
        print(f"\nSampled {when}:\n{sampled}")
    print(f"\nWritten to {options.out}: adapter, loss.png, samples.txt, result.json")
    _judge(results)


def _train(
    model: nn.Module, data: text.Data, recipe: Recipe, options: Options, path: Path
) -> dict[str, Result]:
    parameters = peftkern.trainable_parameters(model)
    name = f"{OURS} and {peers.NAME}" if options.compare_peers else OURS
    progress = show.progress(name, recipe.steps, options.quiet)
    run = partial(train.run, model, parameters, data.train, data.held_out, recipe)
    if not options.compare_peers:
        return {OURS: run(progress)}
    with peers.Twin(path, options, recipe) as twin:
        ours = run(twin.in_turn(progress))
        return {OURS: ours, peers.NAME: twin.result()}


def _write(out: Path, results: dict[str, Result], recipe: Recipe, written: dict[str, str]) -> None:
    measured = {name: asdict(result) for name, result in results.items()}
    document = {"recipe": asdict(recipe), "torch": torch.__version__, "results": measured}
    (out / "result.json").write_text(json.dumps(document, indent=1) + "\n")
    texts = [f"{when}:\n{sampled}\n" for when, sampled in written.items()]
    (out / "samples.txt").write_text("\n".join(texts), encoding="utf-8")


def _judge(results: dict[str, Result]) -> None:
    if peers.NAME in results:
        print(peers.verdict(results[OURS], results[peers.NAME]))
    before = train.perplexity(results[OURS].held_out_before)
    after = train.perplexity(results[OURS].held_out_after)
    if not after < before:
        raise DemoFailed(
            f"held-out perplexity must fall, got {before:.2f} before and {after:.2f} after"
        )
    if peers.NAME in results and not peers.agree(results[OURS], results[peers.NAME]):
        raise DemoFailed(
            f"the loss curves must agree within {peers.TOLERANCE}, got a difference of "
            f"{peers.difference(results[OURS], results[peers.NAME]):.4f}"
        )
