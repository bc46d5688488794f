"""Bi-AdaptFormer and its twin in float32, on one frozen vision transformer.

The base learns to read upright digits. Then each of the runs has to read digits that are turned by
a quarter: with a new head alone, with AdaptFormers in float32, and with AdaptFormers of one bit.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkern
from peftkern import bottleneck, onebit
from peftkern._attached import AttachedAdapter
from peftkern.demo import show, train
from peftkern.demo.images import CLASSES, Images, digits
from peftkern.demo.options import DemoFailed, Options

HEAD, FLOAT, OURS = "head alone", "AdaptFormer, float32", "Bi-AdaptFormer, 1 bit"
BITS, WEIGHTS = "adapter.bin", "adapter-float32.safetensors"


@dataclass(frozen=True)
class Recipe:
    steps: int = 200
    batch: int = 32
    learning_rate: float = 5e-3
    warmup: int = 10
    base_steps: int = 400
    base_learning_rate: float = 2e-3
    r: int = 32
    scale: float = 10.0
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What a run measured; accuracies are of the held-out images."""

    losses: list[float]
    seconds: list[float]
    accuracy: float
    trainable: int
    adapter_bytes: int

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(self.seconds)


def run(options: Options) -> None:
    """Does the work, prints the results and writes them to `options.out`.

    Raises:
        DemoFailed: 1-bit adapters read no more than the head alone, or their file something else.
    """
    recipe = Recipe() if options.steps is None else Recipe(steps=options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    images = digits()
    torch.manual_seed(recipe.seed)
    base = transformer()
    with show.progress("base", recipe.base_steps, options.quiet) as report:
        steps, rate = recipe.base_steps, recipe.base_learning_rate
        _train(base, images.base, recipe, steps, rate, report)
    base.requires_grad_(False)
    facts = {
        "base: upright digits that it learned": f"{accuracy(base, images.base):.1%}",
        "base: turned digits, held out": f"{accuracy(base, images.held_out):.1%}",
    }
    results = {}
    for name, place in (HEAD, lambda *_: None), (FLOAT, _place_float), (OURS, _place):
        model = deepcopy(base)
        torch.manual_seed(recipe.seed)
        place(model, recipe)
        model.classifier = nn.Linear(model.config.hidden_size, CLASSES)
        with show.progress(name, recipe.steps, options.quiet) as report:
            losses, seconds = _train(
                model, images.train, recipe, recipe.steps, recipe.learning_rate, report
            )
        size = _save(model, name, options.out)
        trainable = sum(p.numel() for p in peftkern.trainable_parameters(model))
        reached = accuracy(model, images.held_out)
        results[name] = Result(losses, seconds, reached, trainable, size)
    read = _from_file(base, recipe, options.out)
    facts["1 bit, read from its file"] = f"{accuracy(read, images.held_out):.1%}"
    _show(results, facts, recipe, images, options.out)
    _judge(results, accuracy(read, images.held_out))


def transformer() -> Any:
    """A ViT of transformers: 4 blocks of width 64, 17 tokens."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        image_size=8, patch_size=2, num_channels=1, num_labels=CLASSES, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


class AdaptFormer(AttachedAdapter):
    """The branch without a quantiser, where one with it stood: zero at first."""

    def __init__(self, instead: onebit.OneBitAdapter) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(instead.down.detach()), nn.Parameter(instead.up.detach())
        nn.init.zeros_(self.up)
        self.carried, self.scale = instead.carried, instead.scale

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return bottleneck.linear(x, self.down, self.up, scale=self.scale, residual=y)


def _place(model: nn.Module, recipe: Recipe) -> None:
    config = peftkern.OneBitConfig(r=recipe.r, scale=recipe.scale, placement="adaptformer")
    peftkern.adapt(model, config)


def _place_float(model: nn.Module, recipe: Recipe) -> None:
    _place(model, recipe)
    for block in list(model.modules()):
        if isinstance(instead := block._modules.get("adapter"), onebit.OneBitAdapter):
            block.adapter = AdaptFormer(instead)


def _train(
    model: nn.Module, images: Images, recipe: Recipe, steps: int, rate: float,
    report: Callable[[int, float], None],
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Losses and seconds of the steps."""
    plan = train.Recipe(steps=steps, batch=recipe.batch, warmup=recipe.warmup, seed=recipe.seed)
    parameters = peftkern.trainable_parameters(model.train())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: train.rate(step, plan))
    losses: list[float] = []
    seconds: list[float] = []
    for chosen in train.batches(torch.arange(len(images)), plan):
        start = time.perf_counter()
        logits = model(images.pixels[chosen]).logits
        loss = nn.functional.cross_entropy(logits, images.labels[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        report(len(losses), losses[-1])
    return losses, seconds


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    guesses = model.eval()(images.pixels).logits.argmax(-1)
    return int((guesses == images.labels).sum()) / len(images)


def _save(model: Any, name: str, out: Path) -> int:
    """Writes the adapter, head left out, and says in how many bytes."""
    if name == OURS:
        peftkern.save_adapter(model, out / "adapter")
        onebit.export_bits(model, out / "with-head.bin", head=model.classifier)
        onebit.export_bits(model, out / BITS)
        return (out / BITS).stat().st_size
    if name == HEAD:
        return 0
    from safetensors.torch import save_file

    weights = {
        f"{name}.{part}": parameter.detach()
        for name, module in model.named_modules()
        if isinstance(module, AdaptFormer)
        for part, parameter in module.named_parameters()
    }
    save_file(weights, out / WEIGHTS)
    return (out / WEIGHTS).stat().st_size


def _from_file(base: Any, recipe: Recipe, out: Path) -> nn.Module:
    """The base again, with what the file holds and nothing else."""
    model = deepcopy(base)
    _place(model, recipe)
    return onebit.import_bits(model, out / "with-head.bin", head=model.classifier)  # type: ignore[no-any-return]


def _show(
    results: dict[str, Result], facts: dict[str, str], recipe: Recipe, images: Any, out: Path
) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{recipe.steps} steps of {recipe.batch} digits, turned by a quarter; scikit-learn's"
    drawn = Table(title=title)
    drawn.add_column("")
    for name in results:
        drawn.add_column(name, justify="right")
    rows: dict[str, Callable[[Result], str]] = {
        f"accuracy on {len(images.held_out)} held out": lambda r: f"{r.accuracy:.1%}",
        "loss of the last 20 steps": lambda r: f"{statistics.fmean(r.losses[-20:]):.3f}",
        "seconds a step, median": lambda r: f"{r.seconds_per_step:.4f}",
        "trainable parameters": lambda r: f"{r.trainable:,}",
        "the adapters' file, bytes": lambda r: f"{r.adapter_bytes:,}",
    }
    for label, cell in rows.items():
        drawn.add_row(label, *(cell(result) for result in results.values()))
    Console().print(drawn)
    for label, fact in facts.items():
        print(f"{label}: {fact}")
    document = {"recipe": asdict(recipe), "torch": torch.__version__}
    document["results"] = {name: asdict(result) for name, result in results.items()}
    (out / "result.json").write_text(json.dumps(document, indent=1) + "\n")
    show.curves({name: result.losses for name, result in results.items()}, out / "loss.png")
    print(f"\nWritten to {out}: adapter, {BITS} (as published), loss.png, result.json")


def _judge(results: dict[str, Result], read: float) -> None:
    ours, head = results[OURS].accuracy, results[HEAD].accuracy
    if not ours > head:
        raise DemoFailed(
            f"1-bit adapters must read more than the head alone, got {ours:.1%} and {head:.1%}"
        )
    if read != ours:
        raise DemoFailed(f"the file must hold what was trained, got {read:.1%} from it")
