"""Scores for the tests of selection, and what a stable sort picks of them."""

import math

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def scores(shapes, dtypes, seed=0, levels=0):
    """Numbers, and among them a NaN, an infinity, zeros of both signs; many equal ones if asked."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, shape in enumerate(shapes):
        score = torch.randn(*shape, generator=generator)
        if levels:
            score = (score * levels).round() / levels
        flat = score.view(-1)
        for place, value in enumerate((math.nan, -math.inf, 0.0, -0.0, 1e-40)):
            if len(flat) > 7 * place + i:
                flat[7 * place + i] = value
        found.append(score.to(dtypes[i % len(dtypes)]))
    return found


def sorted_first(scores, count, largest):
    """What a stable sort of all magnitudes picks, as masks."""
    flat = torch.cat([score.double().abs().flatten() for score in scores])
    numbers = int((~flat.isnan()).sum())
    flat = flat.nan_to_num(nan=-1.0 if largest else math.inf, posinf=1e300)
    order = flat.sort(stable=True, descending=largest).indices[: min(count, numbers)]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]
