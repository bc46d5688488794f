"""A sparse S beside a quantised base."""

import copy
import pickle

import pytest
import torch
from models import tokens, toy
from test_sparse_adapt import TENTH, moved
from torch import nn

import peftkern
from peftkern import SparseConfig
from peftkern.qlora import QuantizedWeight
from peftkern.sparse import AbsThreshold, SmallestFraction, SparseLinear, add_, scale_
from peftkern.sparse.quantized import SparseQuantizedLinear
from peftkern.sparse.support import supports

FORMATS = ["nf4", "int8"]


def adapted(base="nf4", rule=TENTH):
    return moved(peftkern.adapt(toy(), SparseConfig(rule, "delta", base=base)))


def dense(model):
    """The plain model whose weights are what the layers' bases stand for, and S."""
    plain = toy()
    with torch.no_grad():
        for support in supports(model):
            weight = plain.get_parameter(support.name)
            weight.copy_(support.module.base.dequantize(torch.float32))
            weight[support.pattern.mask()] += support.values
    return plain


@pytest.mark.parametrize("base", FORMATS)
def test_the_base_stays_quantised_and_s_is_added(base):
    model = adapted(base)
    assert isinstance(model.layers[0].q_proj.base, QuantizedWeight)
    packed = [s.weight.clone() for s in supports(model)]
    torch.testing.assert_close(model(tokens()), dense(model)(tokens()), rtol=1e-4, atol=1e-5)
    other = dense(model)
    model(tokens()).square().sum().backward()
    other(tokens()).square().sum().backward()
    for support, before in zip(supports(model), packed, strict=True):
        gradient = other.get_parameter(support.name).grad[support.pattern.mask()]
        torch.testing.assert_close(support.values.grad, gradient, rtol=1e-3, atol=1e-3)
        assert torch.equal(support.weight, before)


def test_entries_are_selected_before_the_base_is_quantised():
    """Of the 16 values of nf4 one is 0: by magnitude its codes would be all alike."""
    model = adapted(rule=AbsThreshold(1e-2))
    plain = toy()
    for support in supports(model):
        wanted = plain.get_parameter(support.name).detach().abs() < 1e-2
        assert torch.equal(support.pattern.mask(), wanted)


@pytest.mark.parametrize("base", FORMATS)
def test_a_saved_adapter_belongs_to_its_quantised_base(base, tmp_path):
    model = adapted(base)
    peftkern.save_adapter(model, tmp_path)
    other = peftkern.adapt(toy(), SparseConfig(SmallestFraction(0.02), "delta", base=base))
    peftkern.load_adapter(other, tmp_path)
    assert torch.equal(other(tokens()), model(tokens()))
    with pytest.raises(ValueError, match="must be the base that the adapter belongs to"):
        peftkern.load_adapter(toy(), tmp_path)
    with pytest.raises(ValueError, match="must be the base that the adapter belongs to"):
        peftkern.load_adapter(
            peftkern.adapt(toy(seed=1), SparseConfig(TENTH, "delta", base=base)), tmp_path
        )
    doubled = copy.deepcopy(model)
    scale_(doubled, 2.0)
    add_(other, tmp_path)
    torch.testing.assert_close(other(tokens()), doubled(tokens()))


def test_it_merges_into_a_float_weight_or_its_format_again():
    model = adapted()
    wanted = model(tokens())
    with pytest.raises(ValueError, match="must have a float base to merge into"):
        peftkern.merge(model)
    state = copy.deepcopy(model.state_dict())
    peftkern.merge(model, dtype=torch.float32)
    torch.testing.assert_close(model(tokens()), wanted, rtol=1e-4, atol=1e-5)
    assert not [key for key in model.state_dict() if "sparse" in key]
    peftkern.unmerge(model)
    assert torch.equal(model(tokens()), wanted)
    found = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    with pytest.warns(UserWarning, match="requantize=True stores"):
        peftkern.merge(model, requantize=True)
    assert isinstance(model.layers[0].q_proj.base, QuantizedWeight)


def test_a_quantised_model_is_copied_pickled_and_loaded():
    model = adapted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens()), model(tokens()))
    other = peftkern.adapt(toy(), SparseConfig(SmallestFraction(0.02), "delta", base="nf4"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens()), model(tokens()))


def test_what_bitsandbytes_has_quantised_takes_the_delta_form_alone(bnb):
    linear = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(torch.randn(32, 64), False, quant_type="nf4")
    model = nn.Sequential(linear).to("cpu")
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match="its base is quantised, which takes form='delta'"):
        peftkern.adapt(model, SparseConfig(TENTH))
    weight = QuantizedWeight.from_bnb(model[0].weight)
    peftkern.adapt(model, SparseConfig(TENTH, "delta"))
    assert type(model[0]) is SparseQuantizedLinear
    torch.testing.assert_close(model(x), x @ weight.dequantize().float().t() + model[0].bias)


def test_a_layer_of_its_own_quantises_its_linear():
    linear = nn.Linear(64, 32)
    layer = SparseLinear.from_linear(linear, TENTH, "delta", base="nf4")
    assert type(layer) is SparseQuantizedLinear and layer.weight_sparse.shape == (205,)
    again = SparseLinear.from_linear(layer, TENTH, "delta")
    assert torch.equal(again(torch.ones(2, 64)), layer(torch.ones(2, 64)))


def test_report_and_explain_tell_of_both_parts():
    model = adapted()
    row = peftkern.report(model).rows[0]
    assert (row.layer, row.format) == ("SparseQuantizedLinear", "nf4")
    assert row.mergeable == "by dtype or requantize"
    told = peftkern.explain(model.layers[0].q_proj)
    assert "nf4" in told and "qlora_linear" in told and "sparse_matmul" in told
