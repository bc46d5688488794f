"""Does qlora refuse what it cannot do, naming the argument, before anything is written?"""

from dataclasses import replace

import pytest
import torch
from samples import sample

from peftkern import _native, qlora


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(3, 32, dtype=torch.int32)}, TypeError, "x must be float32"),
        ({"x": torch.ones(3, 31)}, ValueError, r"x must have shape \[..., 32\], got \[3, 31\]"),
        ({"x": torch.ones(())}, ValueError, "x must have shape"),
        ({"x": torch.ones(3, 32, device="meta")}, ValueError, "weight must be on meta, got cpu"),
        ({"weight": "nf4"}, TypeError, "weight must be a Tensor or a QuantizedWeight, got str"),
        ({"weight": torch.ones(8, 32).int()}, TypeError, "weight must be float32"),
        ({"weight": torch.ones(32, 8).t()}, ValueError, "weight must be contiguous"),
        ({"weight": torch.ones(2, 8, 32)}, ValueError, r"\[out, in\]; expert_linear takes experts"),
        ({"bias": torch.ones(7)}, ValueError, r"bias must have shape \[8\], got \[7\]"),
        ({"bias": torch.ones(8).int()}, TypeError, "bias must be float32"),
        ({"lora_a": None}, ValueError, "must come together, got only lora_b"),
        ({"lora_b": None}, ValueError, "must come together, got only lora_a"),
        ({"lora_a": torch.ones(2, 31)}, ValueError, r"lora_a must have shape \[2, 32\]"),
        ({"lora_a": torch.ones(32)}, ValueError, "lora_a must have shape"),
        (
            {"lora_a": torch.ones(0, 32), "lora_b": torch.ones(8, 0)},
            ValueError,
            "rank of at least 1, got 0",
        ),
        ({"lora_a": torch.ones(32, 2).t()}, ValueError, "lora_a must be contiguous"),
        ({"lora_b": torch.ones(8, 3)}, ValueError, r"lora_b must have shape \[8, 2\]"),
        ({"dropout": 1.5}, ValueError, "dropout must be between 0 and 1, got 1.5"),
        ({"dropout": -0.1}, ValueError, "dropout must be between 0 and 1"),
        ({"dropout": 0.5, "seed": torch.ones(1)}, TypeError, "seed must be int64"),
        ({"dropout": 0.5, "seed": torch.ones(2).long()}, ValueError, r"seed must have shape \[1\]"),
        ({"dropout": 0.5, "seed": 3.7}, TypeError, "seed must be an int64 tensor or an int"),
        ({"dropout": 0.5, "seed": 2**63}, ValueError, "seed must fit into 64 bits"),
    ],
)
def test_linear_refuses(change, error, match):
    x, weight, bias, lora_a, lora_b = sample(8, 32, 3, 2)
    given = dict(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b) | change
    with pytest.raises(error, match=match):
        qlora.linear(**given)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(1, 3, 32)}, ValueError, r"x must have shape \[rows, in\]"),
        ({"weight": torch.ones(8, 32)}, ValueError, r"weight must have shape \[experts, out, in\]"),
        ({"offsets": torch.tensor([0, 3])}, ValueError, r"offsets must have shape \[3\]"),
        ({"offsets": torch.tensor([0, 1, 3]).int()}, TypeError, "offsets must be int64"),
        ({"offsets": torch.tensor([0, 4, 3])}, ValueError, "offsets must rise from 0 to 3"),
        ({"offsets": torch.tensor([0, 1, 2])}, ValueError, "offsets must rise from 0 to 3"),
        ({"adapter": torch.tensor([0, 0, 2]).int()}, IndexError, r"adapter must lie in \[-1, 2\)"),
        ({"adapter": torch.tensor([0, 0, -2]).int()}, IndexError, "got -2 to 0"),
        ({"adapter": torch.tensor([0, 0, 1])}, TypeError, "adapter must be int32"),
        ({"adapter": torch.zeros(3, 2).int()[:, 0]}, ValueError, "adapter must be contiguous"),
        (
            {"offsets": torch.tensor([[0, 0], [1, 0], [3, 0]])[:, 0]},
            ValueError,
            "offsets must be con",
        ),
        ({"lora_a": torch.ones(3, 2, 32), "lora_b": torch.ones(3, 8, 2)}, ValueError, "2 experts"),
    ],
)
def test_expert_linear_refuses(change, error, match):
    x, weight, bias, lora_a, lora_b = sample(8, 32, 3, 2, experts=2)
    given = dict(x=x, weight=weight, offsets=torch.tensor([0, 1, 3]), bias=bias)
    with pytest.raises(error, match=match):
        qlora.expert_linear(**given | dict(lora_a=lora_a, lora_b=lora_b) | change)


def test_quantize_and_dequantize_refuse():
    w = torch.ones(4, 32)
    with pytest.raises(TypeError, match="weight must be float32"):
        qlora.quantize(w.int())
    with pytest.raises(ValueError, match="format must be one of nf4, fp4, int8, got 'nf5'"):
        qlora.quantize(w, "nf5")
    with pytest.raises(ValueError, match="block_size must be one of .* got 48"):
        qlora.quantize(w, block_size=48)
    weight = qlora.quantize(w)
    with pytest.raises(TypeError, match="weight must be a QuantizedWeight, got Tensor"):
        qlora.dequantize(w)
    with pytest.raises(TypeError, match="out must be float32"):
        qlora.dequantize(weight, torch.int32)
    with pytest.raises(ValueError, match=r"out must have shape \[4, 32\]"):
        qlora.dequantize(weight, out=torch.empty(32, 4))
    with pytest.raises(ValueError, match="out must be contiguous"):
        qlora.dequantize(weight, out=torch.empty(32, 4).t())


@pytest.mark.skipif(not _native.loaded, reason="needs the compiled library")
def test_a_raw_op_cannot_leave_its_memory():
    """Under the public checks lies a net of its own."""
    x, weight, bias, lora_a, lora_b = sample(8, 32, 3, 2)
    op, buffers, layout = torch.ops.peftkern.qlora_linear, weight.buffers, weight.layout
    rest = [0.5, 0.0, None, None, None]
    strided = torch.empty(32, 3).t()
    short = torch.tensor([0, 9])
    for words, *bad in (
        (
            "x must have 96 elements",
            x[:, :31].contiguous(),
            buffers,
            layout,
            bias,
            lora_a,
            lora_b,
            *rest,
        ),
        ("x must be contiguous", strided, buffers, layout, bias, lora_a, lora_b, *rest),
        ("packed must have", x, buffers, [1, 9, 32, 64, 4], bias, lora_a, lora_b, *rest),
        ("weight must be one dense", x, buffers[:1], layout, bias, lora_a, lora_b, *rest),
        ("bias must have 8", x, buffers, layout, bias[:7], lora_a, lora_b, *rest),
        ("lora_b must have 16", x, buffers, layout, bias, lora_a, lora_b[:7], *rest),
        ("lora_b must come with", x, buffers, layout, bias, lora_a, None, *rest),
        ("come with a seed", x, buffers, layout, bias, lora_a, lora_b, 0.5, 0.5, None, None, None),
        ("offsets must span", x, buffers, layout, bias, lora_a, lora_b, *rest[:3], short, None),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*bad)
    eight = qlora.quantize(torch.ones(8, 32), "int8")
    codes, scales = eight.buffers
    for tensors, layout in (
        ([codes], eight.layout),
        ([codes, scales[:7]], eight.layout),
        ([codes[:7], scales], eight.layout),
        ([codes.view(torch.uint8), scales], eight.layout),
        ([codes, scales.double()], eight.layout),
        ([codes, scales], [1, 9, 32, 0, 8]),
        ([codes, scales], [1, 8, 32, 0, 4]),
        ([codes, scales], [1, 8, 32, 0, 6]),
        ([codes, scales], [1, 8, 32, 0]),
        (buffers, eight.layout),
    ):
        with pytest.raises(RuntimeError):
            op(x, tensors, layout, bias, lora_a, lora_b, *rest)
    thresholds, ranks = weight.format.tables(x.device)
    quantize = torch.ops.peftkern.qlora_quantize
    for bad in (
        (x, [], 64, 4),
        (x, [thresholds[:14], ranks], 64, 4),
        (x, [thresholds, ranks[:15]], 64, 4),
        (x, [thresholds, ranks.int()], 64, 4),
        (x, [thresholds, ranks], 48, 4),
        (x.t(), [thresholds, ranks], 64, 4),
        (x.t(), [], 0, 8),
        (torch.tensor(1.0), [], 0, 8),
        (x, [], 0, 5),
    ):
        with pytest.raises(RuntimeError):
            quantize(*bad)


def test_a_weight_whose_parts_do_not_fit_is_refused():
    weight = qlora.quantize(torch.randn(8, 64))
    for words, change in (
        ("absmax must be contiguous and on cpu", {"absmax": weight.absmax.to("meta")}),
        ("absmax must be contiguous", {"absmax": torch.ones(8, 2)[:, 0]}),
        (r"absmax must be \[8\] torch.float32, got \[7\]", {"absmax": torch.ones(7)}),
        ("block_size must be one of .* got 48", {"block_size": 48}),
        ("quant_map must be", {"codebook": torch.ones(15)}),
    ):
        with pytest.raises(ValueError, match=words):
            replace(weight, **change)
