"""Loads the compiled libraries."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def load(variable: str, name: str) -> bool:
    """Loads what the environment variable names, else the file of this name beside the package's.

    Returns:
        Whether there was one.

    Raises:
        ImportError: a file that is not there, or not for this machine or this torch.
    """
    # Another build of the same library, such as one with sanitizers, may stand in.
    chosen = os.environ.get(variable)
    library = Path(chosen) if chosen else Path(__file__).parent / name
    if not library.exists():
        if chosen:
            raise ImportError(f"{variable} must name a file, got {chosen}")
        return False
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        raise ImportError(f"torch must be 2.11 or newer for peftkern, got {torch.__version__}")
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:  # the loader's own words fill a page and name no remedy
        reason = str(error.__cause__ or error).splitlines()[0].removeprefix(f"{library}: ")
        raise ImportError(
            f"{library} must be built for this machine and this torch ({torch.__version__}), got "
            f"'{reason}': build peftkern again, from its source"
        ) from None
    return True
