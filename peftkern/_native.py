"""Decides which kernel serves which device; nowhere else is that asked.

Every op is defined here with its fake and its reference. C++ fills in the CPU's kernels when the
compiled library is there; a device without a kernel runs the reference and says so once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "peftkern"  # spelled once more, in csrc/common/binding.h
ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")

references: dict[str, Callable[..., Any]] = {}  # of every op
launchers: dict[str, Callable[..., Any]] = {}  # in Triton, of the ops that have one
_triton: set[str] = set()
_warned: set[tuple[str, str]] = set()


def define(schema: str, fake: Callable[..., Any], reference: Callable[..., Any]) -> Any:
    """Defines one op and returns the callable that dispatches to it.

    Args:
        schema: `name(arguments) -> returns` in torch's language, without the namespace.
        fake: computes shapes and dtypes alone.
        reference: the op in plain torch, with the same arguments; serves what has no kernel.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema.removeprefix(name))
    torch.library.register_fake(qualified, fake)
    torch.library.impl(qualified, "CompositeExplicitAutograd", _announced(name, reference))
    references[name] = reference
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def compose(schema: str, fake: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """Defines an op that other ops make up on every device; a compiler does not look into it.

    For what has to keep its bits: compiled, a sum may run in another order.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema.removeprefix(name))
    torch.library.register_fake(qualified, fake)
    torch.library.impl(qualified, "CompositeExplicitAutograd", function)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_triton(family: str, verb: str) -> None:
    """Lets the launcher `peftkern.kernels.<family>.<verb>` serve GPUs where C++ does not."""

    def launch(*args: Any) -> Any:
        return getattr(import_module(f"peftkern.kernels.{family}"), verb)(*args)

    name = f"{family}_{verb}"
    launchers[name] = launch
    if not _has_kernel(f"{NAMESPACE}::{name}", "CUDA"):
        torch.library.impl(f"{NAMESPACE}::{name}", "CUDA", launch)
        _triton.add(name)


class Instead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, ops run these functions, whatever kernels there are.

    Args:
        functions: `references`, `launchers`, or others, by the op's name.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.functions = functions

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own way out of importing its compiler, for a second, at the first op."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = self.functions.get(func._opname) if func.namespace == NAMESPACE else None
        return (chosen or func)(*args, **(kwargs or {}))


def _has_kernel(op: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op, key))


def serves(op: str, device: str) -> bool:
    """Whether a kernel runs there, and not the op's reference."""
    triton = device == "cuda" and op in _triton
    return triton or _has_kernel(f"{NAMESPACE}::{op}", device.upper())


def _announced(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(reference)
    def run(*args: Any) -> Any:
        device = _device_of(args)
        if os.environ.get("PEFTKERN_STRICT") == "1":
            raise NotImplementedError(f"{name} has no kernel for {device} in this build")
        if (name, device) not in _warned:
            _warned.add((name, device))
            warnings.warn(
                f"{name} has no kernel for {device} in this build; its reference in plain torch "
                "runs instead (PEFTKERN_STRICT=1 makes this an error)",
                stacklevel=3,
            )
        return reference(*args)

    return run


def _device_of(args: tuple[Any, ...]) -> str:
    return next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")


def kernels() -> dict[str, dict[str, str]]:
    """For every op, which kernel serves which device."""
    devices = {"cpu": "CPU"} | ({"cuda": "CUDA"} if torch.cuda.is_available() else {})
    return {
        op: {device: _kernel(op, device, key) for device, key in devices.items()}
        for op in references
    }


def _kernel(op: str, device: str, key: str) -> str:
    if device == "cuda" and op in _triton:
        return "Triton"
    return "C++" if _has_kernel(f"{NAMESPACE}::{op}", key) else "reference"


def isa() -> str:
    """The instruction set that the CPU kernels use now."""
    return ISAS[int(torch.ops.peftkern.isa())] if loaded else "none"


def available_isas() -> tuple[str, ...]:
    """Those that this CPU and this build have, from the plainest to the widest."""
    return ISAS[: int(torch.ops.peftkern.best_isa()) + 1] if loaded else ()


def use_isa(name: str) -> None:
    """Makes the CPU kernels use this instruction set from the next call on."""
    if name not in available_isas():
        raise ValueError(
            f"PEFTKERN_ISA must be one of {', '.join(available_isas())} here, got {name}"
        )
    torch.ops.peftkern.use_isa(ISAS.index(name))


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    before = isa()
    use_isa(name)
    try:
        yield
    finally:
        use_isa(before)


def _load() -> bool:
    # Another build of the same library, such as one with sanitizers, may stand in.
    chosen = os.environ.get("PEFTKERN_LIBRARY")
    library = Path(chosen) if chosen else Path(__file__).parent / "_ops.so"
    if not library.exists():
        if chosen:
            raise ImportError(f"PEFTKERN_LIBRARY must name a file, got {chosen}")
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


torch.library.define(f"{NAMESPACE}::isa", "() -> int")
torch.library.define(f"{NAMESPACE}::best_isa", "() -> int")
torch.library.define(f"{NAMESPACE}::use_isa", "(int isa) -> ()")
torch.library.define(f"{NAMESPACE}::poison", "(bool on) -> ()")
loaded = _load()
if loaded and (forced := os.environ.get("PEFTKERN_ISA")):
    use_isa(forced)
