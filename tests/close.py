"""The one tolerance of the suite."""

from peftkern import _verdict


def assert_as_good(actual, fn, *args, factor=_verdict.FACTOR):
    """`actual` may be off the float64 truth by `factor` times what plain torch loses in its dtype.

    Args:
        actual: the result to judge.
        fn: the math in plain torch; called with `args`, and with their float64 images.
        factor: a larger one stands beside its reason.
    """
    (verdict,) = _verdict.judge([actual], lambda *args: [fn(*args)], *args, factor=factor)
    assert verdict.passed, f"off by {verdict.error:.3g}, allowed are {verdict.allowed:.3g}"


def assert_as_good_as(actual, single, truth):
    """The same where the float64 truth and plain torch's result are there already."""
    assert actual.shape == single.shape and actual.dtype == single.dtype
    error, usual = (float((t.double() - truth).abs().max()) for t in (actual, single))
    allowed = _verdict.bound(usual, float(truth.abs().max()), actual.dtype)
    assert error <= allowed, f"off by {error:.3g}, allowed are {allowed:.3g}"
