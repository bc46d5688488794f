"""Decides which kernel serves which device; nowhere else is that asked.

Every op is defined here with its fake and its reference. The compiled library, where it is there,
fills in the CPU's kernels, and those in CUDA where it was built with them and torch is built for
CUDA too; Triton serves GPUs otherwise, and those too old for our CUDA. A device without a kernel
runs the reference and says so once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern import _library

NAMESPACE = "peftkern"  # spelled once more, in csrc/common/binding.h
EMULATED = "peftkern_emulated"  # spelled once more, in csrc/common/cuda_binding.h
ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}  # torch's, of the devices that kernels serve
GPUS = ("cuda", "xpu")
OLDEST = (8, 0)  # the compute capability that CUDA kernels need; see csrc/toolkit.cmake

Functions = dict[str, Callable[..., Any]]
references: Functions = {}  # of every op
launchers: Functions = {}  # in Triton, of the ops that have one
emulated: Functions = {}  # in CUDA and run on the host, of the ops that have one, for tests
_devices: dict[str, tuple[str, ...]] = {}  # of every op, those that call it
_triton: set[tuple[str, str]] = set()  # op and device
_declined: set[str] = set()  # ops whose kernel in CUDA does not run on this machine's GPUs
_warned: set[tuple[str, str]] = set()


def define(
    schema: str,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    devices: tuple[str, ...] = tuple(KEYS),
) -> Any:
    """Defines one op and returns the callable that dispatches to it.

    Args:
        schema: `name(arguments) -> returns` in torch's language, without the namespace.
        fake: computes shapes and dtypes alone.
        reference: the op in plain torch, with the same arguments; serves what has no kernel.
        devices: where it is called at all; a step within other ops may be one of GPUs alone.
    """
    name = schema.split("(", 1)[0]
    op = compose(schema, fake, _announced(name, reference))
    references[name], _devices[name] = reference, devices
    if _has_kernel(f"{NAMESPACE}::{name}", KEYS["cuda"]):
        # CUDA starts later, if at all: asking for a GPU now would start it.
        torch.cuda._lazy_call(partial(_decline_old_gpus, name))  # type: ignore[no-untyped-call]
    if _emulated_loaded:
        torch.library.define(f"{EMULATED}::{name}", schema.removeprefix(name))
        if _has_kernel(f"{EMULATED}::{name}", "CPU"):
            emulated[name] = getattr(getattr(torch.ops, EMULATED), name).default
    return op


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
    """Lets the launcher `peftkern.kernels.<family>.<verb>` serve GPUs where C++ does not, or where
    PEFTKERN_TRITON=1 asks for it."""

    def launch(*args: Any) -> Any:
        with _current(_device_of(args)):
            return getattr(import_module(f"peftkern.kernels.{family}"), verb)(*args)

    name = f"{family}_{verb}"
    launchers[name] = launch
    if find_spec("triton") is None:
        return
    for device in GPUS:
        in_cuda = _has_kernel(f"{NAMESPACE}::{name}", KEYS[device]) and name not in _declined
        if not in_cuda or _triton_is_asked_for():
            _take_triton(name, device)


def _take_triton(name: str, device: str) -> None:
    launch, vendor = launchers[name], _unmeasured_vendor(device)
    _override(name, _told_of(vendor, launch) if vendor else launch, device)
    _triton.add((name, device))


def _override(name: str, function: Callable[..., Any], device: str) -> None:
    with warnings.catch_warnings():  # torch tells of each kernel that another one replaces
        warnings.simplefilter("ignore")
        _overrides.impl(name, function, KEYS[device], allow_override=True)  # type: ignore[no-untyped-call]


def _decline_old_gpus(name: str) -> None:
    """Where one of the GPUs is older than our CUDA, the op goes without it on all of them."""
    gpus = range(torch.cuda.device_count())
    oldest = min(map(torch.cuda.get_device_capability, gpus), default=OLDEST)
    if oldest >= OLDEST:
        return
    _declined.add(name)
    if name in launchers and find_spec("triton") is not None:
        _take_triton(name, "cuda")
    else:
        _override(name, _announced(name, references[name]), "cuda")
    if ("CUDA", "old") not in _warned:
        _warned.add(("CUDA", "old"))
        warnings.warn(
            "peftkern's CUDA kernels need compute capability 8.0, got a GPU of "
            f"{oldest[0]}.{oldest[1]}: those in Triton run instead",
            stacklevel=2,
        )


def _triton_is_asked_for() -> bool:
    return os.environ.get("PEFTKERN_TRITON") == "1"


def _unmeasured_vendor(device: str) -> str | None:
    """Whose GPUs these are, where nobody has run our kernels on them; torch calls AMD's cuda."""
    if device == "xpu":
        return "Intel"
    return "AMD" if torch.version.hip else None


def _told_of(vendor: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(launch)
    def run(*args: Any) -> Any:
        if ("triton", vendor) not in _warned:
            _warned.add(("triton", vendor))
            warnings.warn(
                f"peftkern runs its Triton kernels on this GPU of {vendor}, where nobody has "
                "measured them; `python -m peftkern --selftest` compares them with plain torch",
                stacklevel=3,
            )
        return launch(*args)

    return run


class Instead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, ops run these functions, whatever kernels there are; and so do the ops
    that those functions call.

    Args:
        functions: `references`, `launchers`, `emulated`, both of them, or others, by the op's name.
    """

    entered: ClassVar[list[Instead]] = []

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.functions = functions

    def __enter__(self) -> Instead:
        Instead.entered.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        Instead.entered.pop()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own way out of importing its compiler, for a second, at the first op."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = self.functions.get(func._opname) if func.namespace == NAMESPACE else None
        if chosen is None:
            return func(*args, **(kwargs or {}))
        with self:
            return chosen(*args, **(kwargs or {}))


def _has_kernel(op: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op, key))


def serves(op: str, device: str) -> bool:
    """Whether a kernel runs there now, and not the op's reference.

    PEFTKERN_TRITON=1 rules out what launchers in Triton call in CUDA: they have a way of their own.
    """
    for mode in reversed(Instead.entered):
        if op in mode.functions:
            return mode.functions is not references
    if device not in _devices[op] or (_devices[op] == ("cuda",) and _triton_is_asked_for()):
        return False
    return _kernel(op, device) != "reference"


def _announced(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(reference)
    def run(*args: Any) -> Any:
        device = _device_of(args).type
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


def _device_of(args: tuple[Any, ...]) -> torch.device:
    """That of the first tensor, which may stand in a list."""
    for arg in args:
        for one in arg if isinstance(arg, (list, tuple)) else [arg]:
            if isinstance(one, torch.Tensor):
                return one.device
    return torch.device("cpu")


def _current(device: torch.device) -> Any:
    """Makes a GPU the current one, which Triton launches on wherever the operands lie."""
    return getattr(torch, device.type).device(device) if device.type in GPUS else nullcontext()


def kernels() -> dict[str, dict[str, str]]:
    """For every op, which kernel serves which of this machine's devices that call it."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "xpu": torch.xpu.is_available()}
    return {
        op: {device: _kernel(op, device) for device in devices if there[device]}
        for op, devices in _devices.items()
    }


def _kernel(op: str, device: str) -> str:
    if (op, device) in _triton:
        return "Triton"
    declined = device == "cuda" and op in _declined
    if declined or not _has_kernel(f"{NAMESPACE}::{op}", KEYS[device]):
        return "reference"
    return "C++" if device == "cpu" else "CUDA"


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


torch.library.define(f"{NAMESPACE}::isa", "() -> int")
torch.library.define(f"{NAMESPACE}::best_isa", "() -> int")
torch.library.define(f"{NAMESPACE}::use_isa", "(int isa) -> ()")
torch.library.define(f"{NAMESPACE}::poison", "(bool on) -> ()")
_overrides = torch.library.Library(NAMESPACE, "IMPL")  # type: ignore[no-untyped-call]
loaded = _library.load("PEFTKERN_LIBRARY", "_ops.so")
_emulated_loaded = _library.load("PEFTKERN_EMULATED_LIBRARY", "_emulated.so")
if _emulated_loaded:
    torch.library.define(f"{EMULATED}::poison", "(bool on) -> ()")
if loaded and (forced := os.environ.get("PEFTKERN_ISA")):
    use_isa(forced)
