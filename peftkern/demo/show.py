"""What the demo shows: progress, the table, the plot, and text sampled from the model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkern.demo.train import Recipe, Result, perplexity

PLAIN_LINES = 10  # of progress, where there is no terminal to draw a bar on


def bars_wanted(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


def say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(name: str, steps: int, quiet: bool) -> Iterator[Callable[[int, float], None]]:
    """Yields what the loop calls after each step, with its number and loss."""
    if bars_wanted(quiet):
        with _bar(name, steps) as report:
            yield report
    else:
        start = time.perf_counter()

        def report(step: int, loss: float) -> None:
            if step % max(1, steps // PLAIN_LINES) == 0 or step == steps:
                passed = time.perf_counter() - start
                say(f"{name}: step {step} of {steps}, loss {loss:.3f}, {passed:.0f} s", quiet)

        yield report


@contextmanager
def _bar(name: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=steps, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.3f}")


def table(results: dict[str, Result], recipe: Recipe, facts: dict[str, str]) -> None:
    """A column for each run in `results`; `facts` hold for all of them."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=f"{recipe.steps} steps of {recipe.batch} x {recipe.length} tokens")
    drawn.add_column("")
    for name in results:
        drawn.add_column(name, justify="right")

    def row(label: str, cell: Callable[[Result], str]) -> None:
        drawn.add_row(label, *(cell(result) for result in results.values()))

    row("held-out loss, before", lambda r: f"{r.held_out_before:.4f}")
    row("held-out loss, after", lambda r: f"{r.held_out_after:.4f}")
    row("held-out perplexity, before", lambda r: f"{perplexity(r.held_out_before):.2f}")
    row("held-out perplexity, after", lambda r: f"{perplexity(r.held_out_after):.2f}")
    row("seconds a step, median", lambda r: f"{r.seconds_per_step:.3f}")
    row("tokens a second", lambda r: f"{recipe.batch * recipe.length / r.seconds_per_step:.0f}")
    whole = "" if all(r.peak_of_training for r in results.values()) else " (loading included)"
    row(f"peak memory{whole}", lambda r: megabytes(r.peak_memory))
    row("trainable parameters", lambda r: f"{r.trainable:,}")
    for label, fact in facts.items():
        drawn.add_row(label, *([fact] * len(results)))
    Console().print(drawn)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.{0 if size >= 1e7 else 2}f} MB"


def plot(results: dict[str, Result], path: Path) -> None:
    held_out = {name: (r.held_out_before, r.held_out_after) for name, r in results.items()}
    curves({n: r.losses for n, r in results.items()}, path, "loss (nats a token)", held_out)


def curves(
    losses: dict[str, list[float]],
    path: Path,
    label: str = "loss",
    held_out: dict[str, tuple[float, float]] | None = None,
) -> None:
    """Of every run its training loss, and what it was on held-out data before and after."""
    # A Figure without pyplot: no display, no window, no state that outlives the call.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for (name, values), style in zip(losses.items(), ("-", "--", ":"), strict=False):
        steps = range(1, len(values) + 1)
        (line,) = axes.plot(steps, values, style, linewidth=1, label=f"{name}, training")
        if held_out is not None:
            color, ends = line.get_color(), [0, len(values)]
            axes.plot(ends, held_out[name], "o", color=color, label=f"{name}, held-out")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def sample(model: nn.Module, tokenizer: Any, prompt: str, seed: int, tokens: int = 60) -> str:
    """What the model goes on to write; the same for the same weights."""
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.no_grad():
        written = model.generate(  # type: ignore[operator]
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=settings,
        )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))
