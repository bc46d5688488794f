"""What this build is, what this machine has, and which kernel serves which device."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from peftkern import _native

SHOWN = ("commit", "compiler", "torch", "isas")  # in one line
BUILD_FACTS = ("version", *SHOWN, "cuda", "architectures")


@dataclass(frozen=True)
class Info:
    """What a bug report needs; prints as `python -m peftkern` shows it.

    Args:
        version: of peftkern, or "unknown" where it runs uninstalled from its sources.
        build: facts of the compiled library (commit, compiler, torch, isas, cuda: nvcc's version or
            "none", and its architectures); empty without one.
        python: its version and the platform.
        torch: the version that runs.
        devices: the CPU's threads, and every GPU by name.
        isa: the instruction set that the CPU kernels use, "none" without a compiled library.
        available_isas: those that build and CPU both have.
        kernels: for every op and device, "C++", "CUDA", "Triton" or "reference" (plain torch).
    """

    version: str
    build: dict[str, str]
    python: str
    torch: str
    devices: dict[str, str]
    isa: str
    available_isas: tuple[str, ...]
    kernels: dict[str, dict[str, str]]

    def __str__(self) -> str:
        build = ", ".join(f"{name} {fact}" for name, fact in self.build.items() if name in SHOWN)
        isas = ", ".join(self.available_isas) or "none"
        if self.isa == "none":
            build = "no compiled library: every op runs its reference"
        lines = [
            f"peftkern {self.version}",
            f"build    {build or 'made for another Python, whose facts cannot be read'}",
            f"python   {self.python}",
            f"torch    {self.torch}",
            *(f"{device:8} {facts}" for device, facts in self.devices.items()),
            f"isa      {self.isa} (available: {isas})",
            f"cuda     {self._cuda()}",
            "",
        ]
        width = max(map(len, self.kernels), default=0)
        for op, kernels in self.kernels.items():
            served = ", ".join(f"{device}: {kernel}" for device, kernel in kernels.items())
            lines.append(f"{op:{width}}  {served or 'called on GPUs alone'}")
        return "\n".join(lines)

    def _cuda(self) -> str:
        version = self.build.get("cuda")
        if self.isa == "none" or version == "none":
            return "no kernels in this build"
        if version is None:
            return "not known"
        kernels = f"kernels for {self.build['architectures']} by nvcc {version}"
        return kernels if torch.version.cuda else f"{kernels}, which this torch has no use for"


def info() -> Info:
    """What this build is, what this machine has, and which kernel serves which device.

    Returns:
        An `Info`; its text is what `python -m peftkern` prints.
    """
    build = _build_facts()
    return Info(
        version=build.pop("version", "") or _installed_version(),
        build=build,
        python=f"{platform.python_version()} on {platform.platform()}",
        torch=torch.__version__,
        devices=_devices(),
        isa=_native.isa(),
        available_isas=_native.available_isas(),
        kernels=_native.kernels(),
    )


def _build_facts() -> dict[str, str]:
    """Of the library in use; without one, those of a build that lies elsewhere say nothing."""
    if not _native.loaded:
        return {}
    try:
        facts = importlib.import_module("peftkern._build")
    except ModuleNotFoundError:
        return {}
    return {name: fact for name in BUILD_FACTS if (fact := getattr(facts, name, ""))}


def _installed_version() -> str:
    try:
        return importlib.metadata.version("peftkern")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _devices() -> dict[str, str]:
    machine = platform.processor() or platform.machine()
    devices = {"cpu": f"{machine}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices[f"cuda:{i}"] = (
            f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
        )
    for i in range(torch.xpu.device_count()):
        devices[f"xpu:{i}"] = torch.xpu.get_device_name(i)
    return devices
