"""The most memory that this process held, from a moment on."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak() -> bool:
    """Forgets the peak so far; False where the system keeps one peak for a process's whole life."""
    gc.collect()
    try:
        _CLEAR.write_text("5")
        return True
    except OSError:
        return False


def peak() -> int:
    """Bytes of resident memory at the peak."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
