"""The two files of an adapter on disk: read as a pair, written all or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG, TENSORS, NEW = "adapter_config.json", "adapter_model.safetensors", ".new"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The pair that counts: where a save was killed after its commit, that of the new files."""
    committed = (path / (CONFIG + NEW)).exists()
    config = path / (CONFIG + NEW if committed else CONFIG)
    tensors = path / (TENSORS + NEW)
    if not (committed and tensors.exists()):
        tensors = path / TENSORS
    for file in (config, tensors):
        if not file.is_file():
            raise FileNotFoundError(
                f"path must be a folder with {CONFIG} and {TENSORS}, got {path}"
            )
    try:
        content = json.loads(config.read_bytes())
    except ValueError as error:
        raise ValueError(f"{config.name} must be JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config.name} must hold an object, got {type(content).__name__}")
    try:
        with safe_open(tensors, "pt") as file:
            return content, {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{tensors.name} must be a whole safetensors file, got {error}") from error


def write(path: Path, config: bytes, tensors: bytes) -> None:
    """Two files cannot be replaced in one step, so the new pair is complete before it counts.

    It counts from the moment `adapter_config.json.new` is there (`read` knows); `_finish` moves it
    to its names, at once or before the next save. Where the config stays the same, as in most
    saves, the tensors are replaced in one step.
    """
    path.mkdir(parents=True, exist_ok=True)
    _finish(path)
    (path / (TENSORS + NEW)).unlink(missing_ok=True)  # of a save that was killed before it counted
    if (path / CONFIG).is_file() and (path / CONFIG).read_bytes() == config:
        replace(path / TENSORS, tensors)
        return
    replace(path / (TENSORS + NEW), tensors)
    replace(path / (CONFIG + NEW), config)
    _finish(path)


def _finish(path: Path) -> None:
    """The config goes first: between the steps, peft finds none rather than one that lies."""
    if (path / (CONFIG + NEW)).exists():
        (path / CONFIG).unlink(missing_ok=True)
        if (path / (TENSORS + NEW)).exists():
            os.replace(path / (TENSORS + NEW), path / TENSORS)
            _sync(path)  # the config must not be there before them, a power cut included
        os.replace(path / (CONFIG + NEW), path / CONFIG)
        _sync(path)


def replace(file: Path, content: bytes) -> None:
    """In one step, once the content is on the disk."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)
    _sync(file.parent)


def _sync(folder: Path) -> None:
    """Renames reach the disk with their folder; Windows has no way to ask for that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
