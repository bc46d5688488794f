"""Linears that read one x, in Triton, against the reference: on a GPU, or in the interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launchers import DTYPES, TILES
from samples import FORMATS, quantized

from peftkern import _native, _verdict
from peftkern.qlora import reference

triton_qlora = pytest.importorskip("peftkern.kernels.qlora", reason="needs triton")
from peftkern.kernels import qlora_paths as paths  # noqa: E402

OUTPUTS, RANKS, SCALES = (5, 3, 24), (1, 4, 20), [0.5, 1.0, 1.5]


def sample(device, inputs, columns, dtype, formats=FORMATS):
    """x, the weights, and bias, lora_a and lora_b of each; the second has no bias."""
    torch.manual_seed(columns)
    x = torch.randn(inputs, columns)
    weights = [torch.randn(outputs, columns) for outputs in OUTPUTS]
    weights = [
        weight.to(dtype) if format == "dense" else quantized(weight, format)
        for weight, format in zip(weights, formats, strict=True)
    ]
    shapes = [
        shape
        for outputs, rank in zip(OUTPUTS, RANKS, strict=True)
        for shape in ([outputs], [rank, columns], [outputs, rank])
    ]
    parameters = [torch.randn(shape).to(device, dtype) for shape in shapes]
    parameters[3] = None
    return x.to(device, dtype), [w.to(device) for w in weights], parameters


def arguments(weights, parameters, dropout, seeds):
    """Of both ops, from the weights on."""
    parts = [
        ([w], [1, *w.shape, 0, 0]) if isinstance(w, torch.Tensor) else (w.buffers, w.layout)
        for w in weights
    ]
    tensors = [t for buffers, _ in parts for t in buffers]
    layouts = [n for buffers, layout in parts for n in (len(buffers), *layout)]
    three = parameters[::3], parameters[1::3], parameters[2::3]
    return [tensors, layouts, *three, SCALES, dropout, seeds]


@given(
    inputs=st.sampled_from([0, 1, 40]),
    columns=st.sampled_from([1, 37, 64, 100]),
    dtype=DTYPES,
    formats=st.permutations([*FORMATS, "dense"]).map(lambda all: all[:3]),
    p=st.sampled_from([0.0, 0.25, 1.0]),
    path=st.sampled_from(["gemm", "panels"]),
    tile=st.sampled_from(TILES),
)
def test_outputs_and_gradients_are_the_reference_s(
    device, inputs, columns, dtype, formats, p, path, tile
):
    x, weights, parameters = sample(device, inputs, columns, dtype, formats)
    seeds = [torch.tensor([i], device=device) for i in range(3)] if p else []
    fixed = arguments(weights, parameters, p, seeds)
    grads = [torch.randn(inputs, outputs).to(device, dtype) for outputs in OUTPUTS]
    needs = [True, *(t is not None for t in parameters)]
    with paths.forced(path, tile):
        found = triton_qlora.siblings(x, *fixed)
        ys, downs = found[:3], found[3:]
        gradients = triton_qlora.siblings_bwd(grads, x, downs, *fixed, needs)

    def plain(x, *rest):
        dense, parameters, grads = rest[:3], rest[3:12], rest[12:]
        leaves = [t if t is None else t.detach().requires_grad_() for t in (x, *parameters)]
        x, *parameters = leaves
        ys = [
            reference.linear(
                x, w, *parameters[3 * i : 3 * i + 3], SCALES[i], p, (seeds or [None] * 3)[i]
            )
            for i, w in enumerate(dense)
        ]
        return [
            *(y.detach() for y in ys),
            *torch.autograd.grad(ys, [t for t in leaves if t is not None], grads),
        ]

    dense = [w if isinstance(w, torch.Tensor) else w.dequantize(torch.float32) for w in weights]
    # One sum where plain torch rounds three, and in 16 bits the buffer rounds it three times too.
    verdicts = list(_verdict.judge([*ys, *gradients], plain, x, *dense, *parameters, *grads))
    assert all(v.passed for v in verdicts), [str(v) for v in verdicts]
    for a, down, i in zip(fixed[3], downs, range(3), strict=True):
        seed = seeds[i] if seeds else None

        def low_rank(x, a, seed=seed):
            return [(reference.dropout(x, p, seed) @ a.t()).float()]

        (verdict,) = _verdict.judge([down], low_rank, x, a)
        assert verdict.passed, verdict


def test_only_what_is_asked_for_is_computed(device):
    x, weights, parameters = sample(device, 20, 64, torch.bfloat16)
    fixed = arguments(
        weights, parameters, 0.25, [torch.tensor([i], device=device) for i in range(3)]
    )
    downs = triton_qlora.siblings(x, *fixed)[3:]
    grads = [torch.randn(20, outputs).to(x) for outputs in OUTPUTS]
    all_of = [True, *(t is not None for t in parameters)]
    full = triton_qlora.siblings_bwd(grads, x, downs, *fixed, all_of)
    places = [i for i, need in enumerate(all_of) if need]
    for chosen in [[], [0], places[1:], *([i] for i in places[1:])]:
        needs = [i in chosen for i in range(10)]
        read = x if any(needs[2::3]) else None  # by the gradients of lora_a alone
        found = triton_qlora.siblings_bwd(grads, read, downs, *fixed, needs)
        wanted = [grad for i, grad in zip(places, full, strict=True) if i in chosen]
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 0, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_x_has_any_number_of_dimensions_and_double_precision(device, shape, dtype):
    _, weights, parameters = sample(device, 1, 64, dtype)
    x = torch.randn(shape).to(device, dtype)
    fixed = arguments(weights, parameters, 0.0, [])
    found = triton_qlora.siblings(x, *fixed)
    wanted = _native.references["qlora_siblings"](x, *fixed)
    grads = [torch.randn_like(y) for y in found[:3]]
    needs = [True, *(t is not None for t in parameters)]
    found += triton_qlora.siblings_bwd(grads, x, found[3:], *fixed, needs)
    wanted += _native.references["qlora_siblings_bwd"](grads, x, wanted[3:], *fixed, needs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
