"""Adapting layer by layer: the memory that takes, and what is left when it runs out."""

import weakref

import pytest
import torch
from models import assert_unchanged, placed, snapshot, toy
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern import LoraConfig, QLoRALinear


@pytest.mark.parametrize("how", ["nf4", "turned round", "pissa", "corda"])
def test_no_more_than_one_weight_is_there_in_both_forms(how, monkeypatch):
    """What was replaced is gone before the next is built: the peak is one layer above the end."""
    model = nn.Sequential(*(Conv1D(16, 16) if how == "turned round" else nn.Linear(16, 16)
                            for _ in range(6)))  # fmt: skip
    originals = [weakref.ref(layer.weight) for layer in model]
    alive, from_config = [], QLoRALinear.from_config

    def counting(linear, config, factors):
        layer = from_config(linear, config, factors)
        alive.append(sum(weight() is not None for weight in originals))
        return layer

    monkeypatch.setattr(QLoRALinear, "from_config", counting)
    if how == "corda":
        config = LoraConfig(r=2, base="nf4", init_lora_weights=how)
        peftkern.corda(model, config, lambda: model(torch.randn(3, 16)))
    else:
        start = how if how == "pissa" else True
        base = None if how == "turned round" else "nf4"
        peftkern.adapt(model, LoraConfig(r=2, base=base, init_lora_weights=start))
    assert alive == [6, 5, 4, 3, 2, 1]
    assert not any(weight() is not None for weight in originals)


@pytest.mark.parametrize(("base", "builds"), [(None, 3), ("nf4", 1)])
def test_a_failure_before_a_weight_is_given_up_leaves_the_model_unchanged(
    base, builds, monkeypatch
):
    model, built = toy(), []
    model.lm_head.requires_grad_(False)
    before = snapshot(model)
    from_config = QLoRALinear.from_config

    def fail(linear, config, factors):
        built.append(from_config(linear, config, factors))
        if len(built) == builds:
            raise MemoryError("no more")
        return built[-1]

    monkeypatch.setattr(QLoRALinear, "from_config", fail)
    with pytest.raises(MemoryError):
        peftkern.adapt(model, LoraConfig(base=base))
    assert_unchanged(model, before)


def test_memory_that_runs_out_later_leaves_the_layers_that_are_done(monkeypatch):
    model, built = toy(), []
    from_config = QLoRALinear.from_config

    def fail_at_third(linear, config, factors):
        if len(built) == 2:
            raise MemoryError("no more")
        built.append(from_config(linear, config, factors))
        return built[-1]

    config = LoraConfig(base="nf4")
    with monkeypatch.context() as patch:
        patch.setattr(QLoRALinear, "from_config", fail_at_third)
        with pytest.raises(MemoryError):
            peftkern.adapt(model, config)
    assert len(placed(model)) == 2 and type(model.layers[1].q_proj) is nn.Linear
    assert model.layers[1].q_proj.weight.requires_grad
    peftkern.adapt(model, config)  # does the rest
    assert placed(model) == placed(peftkern.adapt(toy(), config))
