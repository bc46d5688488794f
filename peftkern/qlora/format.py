"""What an encoding is: a description, which the kernels take as tables and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftkern.qlora import reference

BLOCK_SIZES = tuple(2**i for i in range(4, 13))


@dataclass(frozen=True)
class Format:
    """A frozen description of an encoding; nothing asks for its name.

    4 bits: value = codebook[code] * the scale of its block, `block_size` consecutive elements of
    the flat weight; the first code of a pair lies in the high bits of its byte. A number over its
    scale has as its rank how many thresholds lie strictly below it, and each rank has a code.
    8 bits: value = code * (the scale of its row / 127), the code a signed byte.

    Args:
        name: what users and files call it.
        bits: the width of a code, 4 or 8.
        codebook: the 16 values of 4-bit codes, in [-1, 1].
        thresholds: 15, rising; the midpoints of the sorted codebook where none are given.
        codes: the code of each rank; those of the sorted codebook where none are given.

    Raises:
        ValueError: a width or a table that no kernel reads.
    """

    name: str
    bits: int
    codebook: tuple[float, ...] = field(default=(), repr=False)
    thresholds: tuple[float, ...] = field(default=(), repr=False)
    codes: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")
        values = 16 if self.bits == 4 else 0
        if len(self.codebook) != values:
            raise ValueError(
                f"codebook must have {values} values for {self.bits} bits, got {len(self.codebook)}"
            )
        rising = tuple(sorted(self.thresholds)) == self.thresholds
        if len(self.thresholds) not in {0, max(values - 1, 0)} or not rising:
            raise ValueError(
                f"thresholds must be {max(values - 1, 0)}, rising, got {self.thresholds}"
            )
        if self.codes and sorted(self.codes) != list(range(values)):
            raise ValueError(f"codes must be each code once, got {self.codes}")

    @property
    def in_blocks(self) -> bool:
        """Whether scales belong to blocks, of a size to choose, and may be nested; or to rows."""
        return self.bits == 4

    def tables(self, device: torch.device) -> list[Tensor]:
        """What `qlora_quantize` rounds by: thresholds float32 `[15]`, codes uint8 `[16]`."""
        if not self.codebook:
            return []
        values, order = torch.tensor(self.codebook, dtype=torch.float32).sort(stable=True)
        thresholds = reference.midpoints(values)
        if self.thresholds:
            thresholds = torch.tensor(self.thresholds, dtype=torch.float32)
        codes = torch.tensor(self.codes) if self.codes else order
        return [thresholds.to(device), codes.to(device, torch.uint8)]


def by_magnitude(limits: tuple[float, ...]) -> tuple[float, ...]:
    """Thresholds of magnitudes as thresholds of numbers, where a tie takes the smaller magnitude.

    Below zero a tie has to take the higher rank, so those thresholds lie one ulp further out. The
    two codes of zero part at the smallest normal number: -0 is 0, and what flushes smaller numbers
    to zero, as GPUs do, finds the same codes.
    """
    above = torch.tensor(limits, dtype=torch.float32)
    below = torch.nextafter(-above, torch.tensor(-torch.inf)).flip(0)
    return (*below.tolist(), -torch.finfo(torch.float32).tiny, *above.tolist())


formats = {
    known.name: known
    for known in (
        Format("nf4", 4, reference.NF4),
        Format("fp4", 4, reference.FP4, by_magnitude(reference.FP4_LIMITS), reference.FP4_CODES),
        Format("int8", 8),
    )
}


def find_format(name: str | Format) -> Format:
    if isinstance(name, Format):
        return name
    if name not in formats:
        raise ValueError(f"format must be one of {', '.join(formats)}, got {name!r}")
    return formats[name]
