"""`explain`: what a layer runs, in words."""

import pytest
import torch
from needs import needs_kernels
from peft_models import BASES, adapted, layer, with_second_adapter
from torch import nn

import peftkern
from peftkern import QLoRALinear, _native


@pytest.mark.parametrize("base", BASES)
@needs_kernels
def test_a_layer_on_our_kernels_names_them(base):
    model = adapted(base)
    one = layer(model)
    assert peftkern.explain(one).endswith(
        "its own forward: not optimized yet (peftkern.optimize does it)"
    )
    peftkern.optimize(model)
    lines = peftkern.explain(one).splitlines()
    assert lines[0].startswith("lora.Linear") and "64 x 64 in" in lines[0]
    assert (base or "float32") in lines[0] and lines[0].endswith("on cpu")
    assert lines[1] == "runs      peftkern.qlora, base and adapter default of rank 4 in one pass"
    isa = _native.isa()
    assert lines[2:] == [
        f"forward   qlora_linear: C++ ({isa})", f"backward  qlora_linear_bwd: C++ ({isa})",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "default of rank 4 in one pass, then a factor for each row (DoRA)"),
        (
            {"lora_dropout": 0.5},
            "default of rank 4 in two passes, then a factor for each row (DoRA)",
        ),
    ],
)
@needs_kernels
def test_dora_is_named_with_what_its_dropout_costs(options, words):
    model = adapted("nf4", use_dora=True, **options)
    peftkern.optimize(model)
    assert peftkern.explain(layer(model)).splitlines()[1].endswith(f"base and adapter {words}")
    model.eval()
    assert "in one pass, then a factor" in peftkern.explain(layer(model))


@needs_kernels
def test_of_several_adapters_those_with_dora_are_named():
    model = with_second_adapter(adapted("nf4", use_dora=True), use_dora=False)
    model.base_model.set_adapter(["default", "second"])
    peftkern.optimize(model)
    assert (
        peftkern.explain(layer(model))
        .splitlines()[1]
        .endswith("in one pass, then a factor for each row (DoRA of default)")
    )


@needs_kernels
def test_a_slower_instruction_set_is_told_of():
    model = adapted("nf4")
    peftkern.optimize(model)
    *_, best = _native.available_isas()
    with _native.using_isa("baseline"):
        text = peftkern.explain(layer(model))
    assert ("C++ (baseline, since it was chosen" in text) == (best != "baseline")
    assert best in text


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (None, "the library's product, since the weight is dense"),
        ("nf4", "gemm below 128, then panels (a heuristic: nobody has measured the interpreter)"),
    ],
)
@needs_kernels
def test_on_a_gpu_the_paths_are_told_and_who_measured_them(base, words, monkeypatch):
    monkeypatch.setattr(_native, "GPUS", ("cpu",))  # as far as explain can see
    one = QLoRALinear.from_linear(nn.Linear(64, 24), r=4, base=base)
    assert peftkern.explain(one).splitlines()[-1] == f"paths     {words}"


@pytest.mark.parametrize("base", [None, "nf4"])
def test_layers_of_our_own_are_explained_too(base):
    one = QLoRALinear.from_linear(nn.Linear(64, 24), r=4, base=base)
    lines = peftkern.explain(one).splitlines()
    assert lines[0].startswith("peftkern.QLoRALinear, 24 x 64 in ")
    assert lines[1] == "runs      peftkern.qlora, base and adapter of rank 4 in one pass"
    one.to("meta")
    assert "plain torch, since this build has no kernel for meta" in peftkern.explain(one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "in one pass, then a factor for each row (DoRA)"),
        ({"merge_aware": True}, "the weight that merging its adapter of rank 4 would store"),
    ],
)
def test_a_variant_and_a_merge_are_explained(options, words):
    one = QLoRALinear.from_linear(nn.Linear(64, 24), r=4, base="nf4", **options)
    assert peftkern.explain(one).splitlines()[1].endswith(words)
    one.merge(dtype=torch.float32)
    assert (
        peftkern.explain(one).splitlines()[1] == "runs      peftkern.qlora, the merged weight alone"
    )


def test_what_is_not_adapted_says_so():
    assert peftkern.explain(nn.Linear(4, 4)).splitlines() == [
        "nn.Linear",
        "runs      its own forward: neither adapted by peft nor quantised by bitsandbytes",
    ]
    with pytest.raises(TypeError, match="^layer must be an nn.Module, got Tensor"):
        peftkern.explain(torch.ones(2))
