"""The twin: the same steps from the same adapter with peft and bitsandbytes.

It runs in a process of its own, so that its memory is its own, and after ours, so that neither
waits for the other's threads.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from peftkern.demo.options import DemoFailed, Options
from peftkern.demo.train import Recipe, Result

NAME = "peft + bitsandbytes"
# The largest difference of the two losses at any step, in nats. Both do the same sums in float32,
# in another order; training multiplies the last bit's difference by some thousands in 100 steps.
TOLERANCE = 0.02


def difference(ours: Result, theirs: Result) -> float:
    return max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))


def agree(ours: Result, theirs: Result) -> bool:
    return difference(ours, theirs) <= TOLERANCE


def verdict(ours: Result, theirs: Result) -> str:
    word = "agree" if agree(ours, theirs) else "differ"
    return (
        f"The loss curves {word}: largest difference {difference(ours, theirs):.2g} "
        f"(tolerance {TOLERANCE}). Against {NAME}: "
        f"{theirs.seconds_per_step / ours.seconds_per_step:.2f}x its speed, "
        f"{ours.peak_memory / theirs.peak_memory:.2f}x its peak memory."
    )


def run_apart(model: Path, options: Options, recipe: Recipe) -> Result:
    """Starts the twin on the adapter in `initial-adapter` and waits for what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        job = {
            "model": str(model),
            "text": None if options.text is None else str(options.text),
            "adapter": str(options.out / "initial-adapter"),
            "recipe": asdict(recipe),
            "quiet": options.quiet,
            "result": str(result),
        }
        done = subprocess.run([sys.executable, "-m", __name__, json.dumps(job)])
        if done.returncode != 0:
            raise DemoFailed(f"{NAME} must finish its steps, got exit status {done.returncode}")
        return Result(**json.loads(result.read_text()))


def _run_here(job: dict[str, Any]) -> None:
    from peft import PeftModel

    from peftkern.demo import model as language_model
    from peftkern.demo import show, train
    from peftkern.demo.run import read_data

    recipe = Recipe(**job["recipe"])
    quiet = job["quiet"]
    loaded = language_model.load(Path(job["model"]), bars=show.bars_wanted(quiet))
    data = read_data(Path(job["text"]) if job["text"] else None, loaded.tokenizer, recipe)
    _quantize(loaded.model)
    model = PeftModel.from_pretrained(loaded.model, job["adapter"], is_trainable=True).train()
    _refuse_fallback(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    progress = show.progress(NAME, recipe.steps, quiet)
    result = train.run(model, parameters, data.train, data.held_out, recipe, progress)
    Path(job["result"]).write_text(json.dumps(asdict(result)))


def _quantize(model: nn.Module) -> None:
    """Every linear but the output head to nested NF4, one at a time.

    The bytes are ours: bitsandbytes rounds a few nested scales in a thousand to another code, and
    that alone would part the curves in the fourth digit. The layers that read them are its own.
    """
    import bitsandbytes

    from peftkern import qlora

    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or linear is head:
            continue
        if linear.in_features % 64 != 0:
            raise DemoFailed(
                f"{name} must have rows of whole blocks of 64 for bitsandbytes, which reads others "
                f"with wrong scales on some CPUs, got {linear.in_features}"
            )
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            device="meta",
        )
        layer.weight = qlora.quantize(linear.weight.detach(), "nf4", 64, nested=True).to_bnb()
        layer.weight.module = layer
        layer.quant_state = layer.weight.quant_state
        layer.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    # Without it peft puts its plain layer around these, which computes the same by another path.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def _refuse_fallback(model: nn.Module) -> None:
    from peft.tuners.lora.bnb import Linear4bit

    if not any(isinstance(module, Linear4bit) for module in model.modules()):
        raise DemoFailed("peft must use its 4-bit layers, got its plain ones")


if __name__ == "__main__":
    try:
        _run_here(json.loads(sys.argv[1]))
    except DemoFailed as failure:
        sys.exit(f"{NAME}: {failure}")
