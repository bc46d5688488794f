"""Does bottleneck refuse what it cannot do, naming the argument, before anything is written?"""

import pytest
import torch
from bottlenecks import sample

from peftkern import _native, bottleneck
from peftkern.bottleneck import Norm


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(3, 32, dtype=torch.int32)}, TypeError, "x must be float32"),
        ({"x": torch.ones(3, 31)}, ValueError, r"x must have shape \[..., 32\], got \[3, 31\]"),
        ({"x": torch.ones(())}, ValueError, "x must have shape"),
        ({"x": torch.ones(3, 32, device="meta")}, ValueError, "down must be on meta, got cpu"),
        ({"down": torch.ones(32)}, ValueError, r"down must have shape \[r, in\], got \[32\]"),
        ({"down": torch.ones(0, 32)}, ValueError, "down must have a rank of at least 1, got 0"),
        ({"down": torch.ones(4, 32).int()}, TypeError, "down must be float32"),
        ({"down": torch.ones(32, 4).t()}, ValueError, "down must be contiguous"),
        ({"up": torch.ones(8, 3)}, ValueError, r"up must have shape \[out, 4\], got \[8, 3\]"),
        ({"up": torch.ones(4, 8).t()}, ValueError, "up must be contiguous"),
        ({"bias_down": torch.ones(3)}, ValueError, r"bias_down must have shape \[4\], got \[3\]"),
        ({"bias_up": torch.ones(8).int()}, TypeError, "bias_up must be float32"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have one element, got shape \[2\]"),
        ({"scale": torch.ones(1).int()}, TypeError, "scale must be float32"),
        ({"scale": "2"}, TypeError, "scale must be a number or a Tensor, got str"),
        ({"activation": "swish"}, ValueError, "activation must be one of identity.* got 'swish'"),
        ({"residual": torch.ones(3, 7)}, ValueError, r"residual must have shape \[3, 8\]"),
        ({"residual": torch.ones(3, 8).int()}, TypeError, "residual must be float32"),
        ({"norm": (None, None, 1e-5)}, TypeError, "norm must be a Norm, got tuple"),
        ({"norm": Norm(torch.ones(31))}, ValueError, r"norm.weight must have shape \[32\]"),
        ({"norm": Norm(None, torch.ones(32).int())}, TypeError, "norm.bias must be float32"),
        ({"norm": Norm(eps=-1.0)}, ValueError, "norm.eps must be at least 0, got -1.0"),
        ({"dropout": 1.5}, ValueError, "dropout must be between 0 and 1, got 1.5"),
        ({"dropout": 0.5, "seed": torch.ones(1)}, TypeError, "seed must be int64"),
        ({"dropout": 0.5, "seed": 2**63}, ValueError, "seed must fit into 64 bits"),
    ],
)
def test_linear_refuses(change, error, match):
    x, down, up, _ = sample(3, 32, 4, 8)
    with pytest.raises(error, match=match):
        bottleneck.linear(**dict(x=x, down=down, up=up) | change)


@pytest.mark.skipif(not _native.loaded, reason="needs the compiled library")
def test_a_raw_op_cannot_leave_its_memory():
    """Under the public checks lies a net of its own."""
    x, down, up, _ = sample(3, 32, 4, 8)
    forward, backward = (
        torch.ops.peftkern.bottleneck_linear, torch.ops.peftkern.bottleneck_linear_bwd,
    )  # fmt: skip
    given = dict(
        x=x, down=down, up=up, bias_down=None, bias_up=None, gate=None, scale=1.0, activation=1,
        residual=None, onto_x=False, norm_weight=None, norm_bias=None, eps=None, dropout=0.0,
        seed=None,
    )  # fmt: skip
    bad = (
        ("x must be contiguous", {"x": torch.empty(32, 3).t()}),
        ("down and up must fit", {"x": x[:, :31].contiguous()}),
        ("down and up must fit", {"up": torch.ones(8, 3)}),
        ("bias_down must have 4", {"bias_down": torch.ones(3)}),
        ("bias_up must have 8", {"bias_up": torch.ones(7)}),
        ("gate must have 1", {"gate": torch.ones(2)}),
        ("norm_weight must have 32", {"norm_weight": torch.ones(31)}),
        ("activation must be one", {"activation": 7}),
        ("activation must be one", {"activation": -1}),
        ("x must be as wide as y", {"onto_x": True}),
        ("come with a seed", {"dropout": 0.5}),
        ("a tensor must be float32", {"x": x.int()}),
    )
    for words, change in (
        *bad,
        ("residual must have 24", {"residual": torch.ones(3, 7)}),
        ("residual has the wrong dtype", {"residual": torch.ones(3, 8).double()}),
    ):
        with pytest.raises(RuntimeError, match=words):
            forward(**given | change)
    del given["residual"]
    given |= dict(grad=torch.ones(3, 8), hidden=torch.ones(3, 4), needs=[True] * 8)
    for words, change in (
        *bad,
        ("grad must have 24", {"grad": torch.ones(3, 7)}),
        ("grad has the wrong dtype", {"grad": torch.ones(3, 8).double()}),
        ("hidden must have 12", {"hidden": torch.ones(3, 3)}),
        ("hidden has the wrong dtype", {"hidden": torch.ones(3, 4).double()}),
        ("needs must have 8", {"needs": [True] * 7}),
    ):
        with pytest.raises(RuntimeError, match=words):
            backward(**given | change)
