"""What a time on a GPU needs: a cold cache, a host that is ahead of the device, replays of a graph,
and the facts of the card. None of it does anything on a CPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from .statistics import quantile

L2_BYTES = 256 << 20  # more than any GPU's second-level cache
PERSISTING_L2 = 6  # CU_LIMIT_PERSISTING_L2_CACHE_SIZE
HOST_CALLS, HOST_ROUNDS = 10, 7  # few enough that the queue of launches never fills up
GRAPH_ROUNDS = 15
# Asked for, never set.
QUERIES = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu", "clocks_event_reasons.active",
)  # fmt: skip


class Flush:
    """Fills the second-level cache with something else, by reads: lines that were written would be
    on their way to memory while the next call is timed.
    """

    def __init__(self, device: torch.device, size: int = L2_BYTES) -> None:
        self._buffer = self._sum = None
        if device.type == "cuda":
            kept = persisting_bytes(device)
            if kept:
                raise RuntimeError(
                    f"the persisting part of the L2 cache must be 0 bytes, got {kept}: what lies "
                    "there stays there between timed calls"
                )
            self._buffer = torch.zeros(size // 4, device=device)
            self._sum = torch.zeros((), device=device)

    def __call__(self) -> None:
        if self._buffer is not None:
            torch.sum(self._buffer, 0, out=self._sum)


def persisting_bytes(device: torch.device) -> int | None:
    """Of the cache, what is set aside for lines that ask to stay; None where none can be told."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    torch.cuda.synchronize(device)  # the limit is one of the context, which is made here
    size = ctypes.c_size_t()
    failed = driver.cuCtxGetLimit(ctypes.byref(size), ctypes.c_int(PERSISTING_L2))
    return None if failed else size.value


def host_seconds(call: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """What the host is busy with at each call, while the device works behind it."""
    seconds = []
    for _ in range(HOST_ROUNDS):
        synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        seconds.append((time.perf_counter() - start) / HOST_CALLS)
    synchronize()
    return quantile(seconds, 0.5)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call's launches as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay(keep: Any = result) -> None:  # the graph writes into it
        graph.replay()

    return replay


def launch_facts(
    call: Callable[[], Any],
    timed: Callable[[Callable[[], Any]], float],
    capture: Callable[[Callable[[], Any]], Callable[[], Any]] = captured,
    synchronize: Callable[[], None] = torch.cuda.synchronize,
) -> dict[str, Any]:
    """Host microseconds of a call, and the milliseconds of its graph's replay.

    Args:
        timed: the seconds of one call of what it is given.
    """
    facts: dict[str, Any] = {"host_us": 1e6 * host_seconds(call, synchronize)}
    try:
        replay = capture(call)
        facts["graph_ms"] = 1e3 * quantile([timed(replay) for _ in range(GRAPH_ROUNDS)], 0.5)
    except Exception as error:  # a peer that cannot be captured is a finding
        lines = str(error).splitlines() or [""]
        facts["graph"] = f"{type(error).__name__}: {lines[0][:100]}"
        synchronize()
    return facts


def state() -> dict[str, str]:
    """What nvidia-smi says of the card now; nothing where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    values = answer.stdout.strip().split(", ") if answer.returncode == 0 else []
    return dict(zip(QUERIES, values, strict=False))


def facts() -> dict[str, Any]:
    """What the card is and what runs it; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    properties: Any = torch.cuda.get_device_properties(0)
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "triton": triton,
        "nvidia_smi": state(),
    }
