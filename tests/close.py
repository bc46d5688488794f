"""The one tolerance of the suite."""

import torch


def assert_as_good(actual, fn, *args, factor=2.0):
    """`actual` may be off the float64 truth by `factor` times what plain torch loses in its dtype.

    Args:
        actual: the result to judge.
        fn: the math in plain torch; called with `args`, and with their float64 images.
        factor: a larger one stands beside its reason.
    """
    exact = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    truth, plain = fn(*exact), fn(*args)
    assert actual.shape == plain.shape and actual.dtype == plain.dtype
    if actual.numel() == 0:
        return
    error, allowed = ((x.double() - truth).abs().max() for x in (actual, plain))
    # Of a few sums, plain torch may hit the truth by luck, and their terms may cancel: one rounding
    # of the terms' magnitudes is always allowed.
    sizes = [a.abs() if torch.is_tensor(a) and a.is_floating_point() else a for a in exact]
    floor = torch.finfo(actual.dtype).eps * torch.maximum(truth.abs(), fn(*sizes).abs()).max()
    if actual.dtype == torch.float64:  # then the truth is itself rounded, in another order
        floor *= 16
    assert error <= factor * allowed + floor, f"off by {error:.3g}, plain torch by {allowed:.3g}"
