"""The modules behind each pip extra: looked for by name, imported only where they are used."""

from __future__ import annotations

from importlib.util import find_spec

MODULES = {
    "demo": ("transformers", "accelerate", "gguf", "matplotlib", "rich"),
    "vision": ("sklearn",),
    "bench": ("pytest_benchmark", "matplotlib"),
    "peft": ("peft", "bitsandbytes"),
}


class MissingExtra(ImportError):
    """The message names the extra to install and is all that a user needs to see."""


def need(extra: str, what: str) -> None:
    """Refuses, before any work is done, what could only fail half-way.

    Raises:
        MissingExtra: a module of `extra`, which `what` uses, is not installed.
    """
    missing = [module for module in MODULES[extra] if find_spec(module) is None]
    if missing:
        raise MissingExtra(
            f"{what} must have {' and '.join(missing)} installed, got none: "
            f"pip install 'peftkern[{extra}]'"
        )
