"""Every CUDA kernel on small tensors: what compute-sanitizer runs under.

python -m peftkern.bench.drive

The cases are those of --selftest and a grid for decoding, whose kernel has the most ways to go. An
op that a CUDA kernel serves and no case reaches is an error, so that none goes unseen.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterator

import torch

from peftkern import _native, qlora
from peftkern._verdict import Verdict, judge
from peftkern.qlora import fallback
from peftkern.selftest import FAMILIES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 7, 8, 9, 16)  # on both sides of what one instruction takes
# Outputs and inputs: a sum that is split; blocks that straddle rows; fewer than a tile.
SHAPES = ((64, 4096), (40, 96), (3, 16))
WAYS = (("nf4", 64, False), ("nf4", 32, True), ("fp4", 128, False), ("int8", None, False))
RANK = 5


def decoding(device: torch.device) -> Iterator[Verdict]:
    generator = torch.Generator(device).manual_seed(0)
    for (outputs, inputs), way, dtype, adapted in itertools.product(
        SHAPES, WAYS, DTYPES, (False, True)
    ):
        draw = torch.randn(outputs, inputs, generator=generator, device=device)
        weight = qlora.quantize(draw / inputs**0.5, *way)
        dense = fallback.dense(weight.buffers, weight.layout)[0]
        bias = draw[:, 0].to(dtype) if adapted else None
        lora_b = draw[:, :RANK].contiguous() if adapted else None
        for rows in ROWS:
            x = torch.randn(rows, inputs, generator=generator, device=device).to(dtype)
            down = x[:, :RANK].float().contiguous() if adapted else None
            y = torch.ops.peftkern.qlora_decode(
                x, weight.buffers, weight.layout, bias, down, lora_b, 0.5
            )
            rest = [t for t in (dense, bias, down, lora_b) if t is not None]
            yield from judge([y], _plain, x, *rest)


def _plain(x: torch.Tensor, dense: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
    y = x @ dense.to(x.dtype).t()
    if rest:
        bias, down, lora_b = rest
        y = y + bias + 0.5 * (down.to(x.dtype) @ lora_b.to(x.dtype).t())
    return [y]


def drive(device: torch.device, wanted: Collection[str]) -> list[str]:
    """Runs the cases of these ops; returns what was wrong, in sentences."""
    wrong, seen = [], set()
    for family in FAMILIES:
        for case in family(device):
            if not set(wanted) & set(case.ops):
                continue
            seen.update(case.ops)
            wrong += [f"{case.name}: {v}" for v in case.verdicts() if not v.passed]
    if "qlora_decode" in wanted:
        wrong += [f"qlora_decode: {v}" for v in decoding(device) if not v.passed]
    wrong += [f"{op} must have a case, got none" for op in sorted(set(wanted) - seen)]
    return wrong


def main() -> int:
    served = _native.kernels().items()
    wanted = [op for op, devices in served if devices.get("cuda") == "CUDA"]
    wrong = drive(torch.device("cuda", 0), wanted) if wanted else ["no op has a CUDA kernel"]
    print(*wrong, f"{len(wanted)} ops: {', '.join(wanted)}", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
