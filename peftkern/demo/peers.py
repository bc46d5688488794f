"""The twin: the same steps from the same adapter with peft and bitsandbytes.

It lives in a process of its own, so that its memory is its own, and takes its step after each of
ours, so that whatever else the machine does slows both alike.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch import nn

from peftkern.demo.options import DemoFailed, Options
from peftkern.demo.train import Recipe, Result

NAME = "peft + bitsandbytes"
# The largest difference of the two losses at any step, in nats. Both do the same sums in float32,
# in another order, which came to 1e-6 in 100 steps; other scales of the base come to 5e-4 in 5.
TOLERANCE = 1e-4

Report = Callable[[int, float], None]


def difference(ours: Result, theirs: Result) -> float:
    return max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))


def agree(ours: Result, theirs: Result) -> bool:
    return difference(ours, theirs) <= TOLERANCE


def verdict(ours: Result, theirs: Result) -> str:
    word = "agree" if agree(ours, theirs) else "differ"
    steps = zip(ours.seconds, theirs.seconds, strict=True)
    speed = statistics.median(their_time / our_time for our_time, their_time in steps)
    return (
        f"The loss curves {word}: largest difference {difference(ours, theirs):.2g} "
        f"(tolerance {TOLERANCE}). Against {NAME}, step by step: {speed:.2f}x the speed, "
        f"{ours.peak_memory / theirs.peak_memory:.2f}x the peak memory."
    )


class Twin:
    """The process, from the adapter in `initial-adapter` to what it measured."""

    def __init__(self, model: Path, options: Options, recipe: Recipe) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._result = Path(self._folder.name) / "result.json"
        job = {
            "model": str(model),
            "text": None if options.text is None else str(options.text),
            "adapter": str(options.out / "initial-adapter"),
            "recipe": asdict(recipe),
            "result": str(self._result),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Twin:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()  # it has ended already where all went well
        self._process.communicate()  # closes both pipes
        self._folder.cleanup()

    @contextmanager
    def in_turn(self, progress: AbstractContextManager[Report]) -> Iterator[Report]:
        """`progress`, with a step of the twin after each of ours."""
        self._hear()  # it has read the model and waits
        with progress as report:

            def both(step: int, loss: float) -> None:
                report(step, loss)
                self._say()
                self._hear()

            yield both

    def result(self) -> Result:
        if self._process.wait() != 0:
            self._fail()
        return Result(**json.loads(self._result.read_text()))

    def _say(self) -> None:
        turns = self._process.stdin
        assert turns is not None
        try:
            turns.write("\n")
            turns.flush()
        except BrokenPipeError:
            self._fail()

    def _hear(self) -> None:
        turns = self._process.stdout
        assert turns is not None
        if not turns.readline():
            self._fail()

    def _fail(self) -> None:
        raise DemoFailed(f"{NAME} must finish its steps, got exit status {self._process.wait()}")


@contextmanager
def _when_told(steps: int, answers: IO[str]) -> Iterator[Report]:
    """The twin's side: waits for a line before each step, and writes one after it."""

    def wait() -> None:
        print(file=answers, flush=True)
        if not sys.stdin.readline():
            raise DemoFailed("the other side must be there, got no line from it")

    def report(step: int, loss: float) -> None:
        if step < steps:
            wait()
        else:
            print(file=answers, flush=True)

    wait()
    yield report


def _run_here(job: dict[str, Any], answers: IO[str]) -> None:
    from peft import PeftModel

    from peftkern.demo import model as language_model
    from peftkern.demo import text, train

    recipe = Recipe(**job["recipe"])
    loaded = language_model.load(Path(job["model"]), bars=False)
    data = text.data(Path(job["text"]) if job["text"] else None, loaded.tokenizer, recipe.length)
    _quantize(loaded.model)
    model = PeftModel.from_pretrained(loaded.model, job["adapter"], is_trainable=True).train()
    _refuse_fallback(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    turns = _when_told(recipe.steps, answers)
    result = train.run(model, parameters, data.train, data.held_out, recipe, turns)
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
    answers, sys.stdout = sys.stdout, sys.stderr  # no library's chatter among the answers
    try:
        _run_here(json.loads(sys.argv[1]), answers)
    except DemoFailed as failure:
        sys.exit(f"{NAME}: {failure}")
