"""What ran where: without these facts a number says nothing."""

from __future__ import annotations

import datetime
import os
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import cpuinfo
import torch
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from pytest_benchmark.utils import get_commit_info

from peftkern import _native

from . import gpu
from .row import Run

CPU = Path("/sys/devices/system/cpu/cpu0")
# Facts that name a machine rather than describe it.
PRIVATE = ("node", "release")


@cache
def machine_info() -> dict[str, Any]:
    info = pytest_benchmark_generate_machine_info()
    return {k: v for k, v in info.items() if k not in PRIVATE} | {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu.facts(),
    }


@cache
def commit_info() -> dict[str, Any]:
    """Of the checkout one stands in; without one PEFTKERN_COMMIT, or what the build knows."""
    info: dict[str, Any] = get_commit_info("peftkern")
    if info["id"] in ("unversioned", "unknown"):
        told = os.environ.get("PEFTKERN_COMMIT")
        info["id"] = told or import_module("peftkern._build").commit
    return info


def device_name(device: str = "cpu") -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    brand = cpuinfo.get_cpu_info().get("brand_raw", "CPU")
    widest = (
        "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else machine_info()["capability"]
    )
    *_, best = _native.available_isas() or ("none",)
    held = "" if (isa := _native.isa()) == best else f", peftkern held to {isa}"
    return f"{brand}, {torch.get_num_threads()} threads, {widest}{held}"


def last_level_cache() -> int:
    """Bytes of the largest cache, which may be shared with others; a common size if unknown."""
    sizes = [p.read_text().strip() for p in CPU.glob("cache/index*/size")] if CPU.exists() else []
    units = {"K": 2**10, "M": 2**20}
    return max((int(s[:-1]) * units.get(s[-1], 1) for s in sizes), default=32 * 2**20)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)", "", name.lower())).strip("-")


def this_run(device: str = "cpu") -> Run:
    commit = commit_info()
    return Run(
        device=device_name(device),
        torch=torch.__version__,
        commit=commit["id"][:12] + ("-dirty" if commit["dirty"] else ""),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )
