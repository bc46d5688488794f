"""The images: handwritten digits out of scikit-learn, upright for the base, turned for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BASE, TRAIN = 900, 600  # of 1,797 images; the others are held out
CLASSES = 10


@dataclass(frozen=True)
class Images:
    pixels: Tensor  # [images, 1, 8, 8], in [0, 1]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """No image is in two of them."""

    base: Images  # upright
    train: Images  # turned by a quarter
    held_out: Images  # turned by a quarter


def digits() -> Digits:
    """Digits of 43 people, 8 x 8 pixels in 17 levels of grey, in an order drawn once."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(loaded.images).float().div(16)[order, None]
    labels = torch.from_numpy(loaded.target).long()[order]
    turned = pixels.rot90(1, (2, 3))
    first, last = slice(BASE, BASE + TRAIN), slice(BASE + TRAIN, None)
    return Digits(
        Images(pixels[:BASE], labels[:BASE]),
        Images(turned[first], labels[first]),
        Images(turned[last], labels[last]),
    )
