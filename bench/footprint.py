"""What one call costs besides time: memory, allocations, dispatched ops.

Peak memory is the larger of two counts, over what was held before the call. One is exact and sees
torch's allocator only: the running sum of its allocations, from the profiler. The other sees
everybody, peers with allocators of their own among them, but in pages and only where the system
keeps it (Linux): the growth of the resident set at its highest, in a new thread, so that scratch
memory which threads keep between calls counts as well. On CUDA torch's own peak is taken.

An allocation is one request to torch's allocator. A dispatched op is one pass through torch's
dispatcher, views and what an op calls inside its kernel included: each costs the host its time.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PROC = Path("/proc/self")
OP = re.compile(r"(?!autograd::)\w+::\w+")


@dataclass(frozen=True)
class Footprint:
    peak_mib: float
    allocations: int
    dispatched: int


def _events(call: Callable[[], Any]) -> list[Any]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself otherwise
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        result = call()  # held until the profile ends: a result in use is memory in use
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    return sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())


def _status(key: str) -> int:
    line = next(x for x in (PROC / "status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def _resident_growth(call: Callable[[], Any]) -> int:
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that is only kept for later hides the growth
        (PROC / "clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _status("VmRSS")
        _in_new_thread(call)
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return 0


def _in_new_thread(call: Callable[[], Any]) -> None:
    """With threads of its own under it, too: what threads keep from call to call is made anew."""
    recording = torch.is_grad_enabled()  # a new thread starts with the default

    def run() -> None:
        with torch.set_grad_enabled(recording):
            call()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def footprint(call: Callable[[], Any], device: torch.device) -> Footprint:
    """`call` must be warm: a first call also builds caches that later ones share."""
    events = _events(call)
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    dispatched = sum(OP.fullmatch(event.name()) is not None for event in events)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        held = peak = 0
        for size in sizes:
            held += size
            peak = max(peak, held)
        peak = max(peak, _resident_growth(call))
    return Footprint(peak / 2**20, sum(size > 0 for size in sizes), dispatched)
