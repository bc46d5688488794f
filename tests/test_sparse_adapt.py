"""`adapt`, `report`, `explain`, `merge` and the arithmetic of adapters that train some weights."""

import copy

import pytest
import torch
from models import assert_unchanged, snapshot, tokens, toy
from torch import nn

import peftkern
from peftkern import LoraConfig, SparseConfig, sparse
from peftkern.sparse import AbsThreshold, Budget, Pattern, SmallestFraction, SparseLinear
from peftkern.sparse.state import take
from peftkern.sparse.support import supports

FORMS = ["value", "delta"]
TENTH = SmallestFraction(0.1)


def adapted(form="value", rule=TENTH, **options):
    return peftkern.adapt(toy(), SparseConfig(rule, form, **options))


def moved(model, seed=3):
    """As after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for support in supports(model):
            support.values.add_(0.1 * torch.randn(support.values.shape, generator=generator))
    return model


@pytest.mark.parametrize("form", FORMS)
def test_a_model_computes_the_same_and_trains_the_selected_weights_alone(form):
    plain, model = toy(), adapted(form)
    assert torch.equal(model(tokens()), plain(tokens()))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(name.endswith("proj.weight_sparse") for name in names)
    linears = [m for n, m in plain.named_modules() if n.endswith("proj")]
    total = sum(m.weight.numel() for m in linears)
    assert sum(p.numel() for p in peftkern.trainable_parameters(model)) == round(0.1 * total)
    largest = max(take(s.weight, s.pattern).abs().max() for s in supports(model))
    rest = torch.cat([w.weight.detach().abs().flatten() for w in linears]).sort().values
    assert largest == rest[round(0.1 * total) - 1]
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    optimizer = torch.optim.AdamW(peftkern.trainable_parameters(model), lr=1e-2)
    model(tokens()).square().sum().backward()
    optimizer.step()
    moved = model(tokens())
    assert not torch.equal(moved, plain(tokens()))
    for name, tensor in before.items():
        found = dict(model.named_parameters())[name]
        same = found == tensor
        on = {s.name: s.pattern.mask() for s in supports(model)}
        off = ~on[name] if name in on else torch.ones_like(tensor, dtype=torch.bool)
        assert same[off].all()


def test_report_and_explain_tell_of_it():
    model = adapted()
    rows = {row.name: row for row in peftkern.report(model).rows}
    assert list(rows) == [n for n, m in model.named_modules() if isinstance(m, SparseLinear)]
    row = rows["layers.0.q_proj"]
    (support,) = (s for s in supports(model) if s.name == "layers.0.q_proj.weight")
    assert (row.layer, row.format, row.mergeable) == ("SparseLinear", "float32", "exact")
    assert row.trainable == support.pattern.nnz and row.vllm == "no: sparse"
    told = peftkern.explain(model.layers[0].q_proj)
    assert "32 x 32" in told and "sparse_sddmm" in told and "%" in told
    assert "sparse_matmul" in peftkern.explain(adapted("delta").layers[0].q_proj)


@pytest.mark.parametrize("form", FORMS)
def test_merging_changes_nothing_and_unmerging_restores_every_bit(form):
    plain, model = toy(), moved(adapted(form))
    base = {s.name: s.weight.detach().clone() for s in supports(model)}
    wanted = model(tokens())
    if form == "value":  # which is written by now
        base = {name: plain.get_parameter(name).detach() for name in base}
    peftkern.merge(model)
    torch.testing.assert_close(model(tokens()), wanted)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert {row.mergeable for row in peftkern.report(model).rows} == {"merged"}
    with pytest.raises(RuntimeError, match="must be unmerged to train"):
        model.train()(tokens())
    with pytest.raises(ValueError, match="must not be merged yet"):
        peftkern.merge(model)
    peftkern.unmerge(model)
    for support in supports(model):
        assert torch.equal(support.weight.detach(), base[support.name])
    assert torch.equal(model(tokens()), wanted)


def test_unmerging_keeps_what_entries_learned_that_train_no_longer():
    model = moved(adapted())
    for support in supports(model):
        rows, columns = support.pattern.indices()[:, ::2]
        support.replace(Pattern.from_indices(rows, columns, support.pattern.shape))
    wanted = moved(model)(tokens())
    peftkern.unmerge(peftkern.merge(model))
    assert torch.equal(model(tokens()), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_unloading_leaves_the_plain_modules(form):
    plain, model = toy(), moved(adapted(form))
    wanted = model(tokens())
    peftkern.merge(model, unload=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(model(tokens()), wanted)


def test_merging_refuses_what_is_not_finite_before_anything_changes():
    model = moved(adapted())
    with torch.no_grad():
        supports(model)[-1].values[0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match="must have a finite weight once merged"):
        peftkern.merge(model)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="dtype must be None or torch.float32"):
        peftkern.merge(adapted(), dtype=torch.bfloat16)


def test_beside_lora_both_train_and_merge():
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peftkern.adapt(toy(), (config, SparseConfig(TENTH)))
    reasons = {s.name: s.reason for s in peftkern.report(model).skipped}
    assert reasons["layers.0.q_proj"] == "has an adapter already"
    wanted = moved(model)(tokens())
    peftkern.merge(model)
    torch.testing.assert_close(model(tokens()), wanted)
    peftkern.unmerge(model)
    torch.testing.assert_close(model(tokens()), wanted)


def test_convolutions_norms_and_biases_train_where_they_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(72, 4))
    config = SparseConfig(
        SmallestFraction(0.5), target_modules=["0", "1", "3"], parameters=["weight", "bias"]
    )
    peftkern.adapt(model, config)
    names = {s.name for s in supports(model)}
    assert {"0.weight", "0.bias", "1.bias", "3.weight", "3.bias"} <= names
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert all(s.values.grad is not None for s in supports(model))
    with pytest.raises(ValueError, match="form.*|delta form needs"):
        peftkern.adapt(
            nn.Sequential(nn.LayerNorm(4)), SparseConfig(TENTH, "delta", target_modules=["0"])
        )


def test_weights_without_a_selected_entry_stay_plain():
    model = adapted(rule={"layers.1.q_proj.weight": torch.eye(32, dtype=torch.bool)})
    assert [row.name for row in peftkern.report(model).rows] == ["layers.1.q_proj"]
    assert not model.layers[0].q_proj.weight.requires_grad


def test_a_tied_weight_has_one_support_for_both_its_uses():
    model = toy(tied=True)
    config = SparseConfig(Budget(20), target_modules=["embed", "lm_head"])
    peftkern.adapt(model, config)
    (support,) = supports(model)
    assert support.name == "embed.weight" and support.pattern.nnz == 20
    assert model.lm_head._parameters["weight"] is model.embed._parameters["weight"]
    with torch.no_grad():
        support.values.add_(1.0)
    other = toy(tied=True)
    with torch.no_grad():
        other.embed.weight[support.pattern.mask()] += 1.0
    assert torch.equal(model(tokens()), other(tokens()))


def test_a_tied_weight_without_a_selected_entry_stays_plain():
    model = toy(tied=True)
    weight = model.layers[0].q_proj.weight
    rule = {"layers.0.q_proj.weight": torch.ones_like(weight, dtype=torch.bool)}
    peftkern.adapt(model, SparseConfig(rule, target_modules=["embed", "q_proj", "lm_head"]))
    assert [support.name for support in supports(model)] == ["layers.0.q_proj.weight"]
    assert model.lm_head.weight is model.embed.weight


@pytest.mark.parametrize("form", FORMS)
def test_scaling_goes_from_the_base_through_the_adapter_and_beyond(form):
    plain, model = toy(), moved(adapted(form))
    values = [s.values.detach().clone() for s in supports(model)]
    starts = [take(plain.get_parameter(s.name), s.pattern) for s in supports(model)]
    sparse.scale_(model, 0.6)
    for support, value, start in zip(supports(model), values, starts, strict=True):
        start = torch.zeros_like(start) if form == "delta" else start
        torch.testing.assert_close(support.values.detach(), start + 0.6 * (value - start))
    sparse.scale_(model, 0.0)
    torch.testing.assert_close(model(tokens()), plain(tokens()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="factor must be finite"):
        sparse.scale_(model, float("nan"))
    with pytest.raises(ValueError, match="model must have a support"):
        sparse.scale_(plain, 1.0)
    with pytest.raises(ValueError, match="must be unmerged"):
        sparse.scale_(peftkern.merge(model), 1.0)


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_one_base_add_up(form, tmp_path):
    first, second = moved(adapted(form)), moved(adapted(rule=AbsThreshold(0.05)), seed=7)
    peftkern.save_adapter(second, tmp_path)
    plain = toy()
    dense = copy.deepcopy(plain)
    with torch.no_grad():
        for model, factor in ((first, 1.0), (second, 0.6)):
            for s in supports(model):
                s.write()
                base = plain.get_parameter(s.name)
                if s.form == "value":
                    dense.get_parameter(s.name).add_(s.weight - base, alpha=factor)
                else:
                    dense.get_parameter(s.name)[s.pattern.mask()] += factor * s.values
    sparse.add_(first, tmp_path, 0.6)
    torch.testing.assert_close(first(tokens()), dense(tokens()))
    alone = toy()
    sparse.add_(alone, tmp_path)
    torch.testing.assert_close(alone(tokens()), second(tokens()))
    other = toy(seed=1)
    before = snapshot(other)
    with pytest.raises(ValueError, match="must be the base that the adapter belongs to"):
        sparse.add_(other, tmp_path)
    assert_unchanged(other, before)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"form": "sum"}, "form must be 'value' or 'delta', got 'sum'"),
        ({"base": "nf4"}, "form must be 'delta' on a quantised base, got 'value'"),
        ({"rule": 0.1}, "rule must be a Rule or a mapping"),
        ({"parameters": "weight"}, "parameters must be a list of names"),
        ({"target_modules": "("}, "target_modules must be a regular expression"),
        ({"form": "delta", "base": "nf5"}, "nf5"),
    ],
)
def test_a_config_refuses(options, words):
    with pytest.raises((ValueError, TypeError), match=words.replace("(", r"\(")[:60]):
        SparseConfig(**options)


@pytest.mark.parametrize(
    "config, words",
    [
        (SparseConfig(TENTH, target_modules=["nothing"]), "target_modules must name a module"),
        (SparseConfig(AbsThreshold(0.0)), "rule must select an entry"),
        (SparseConfig({"layers.9.weight": torch.ones(1).bool()}), "entries must name weights"),
        (
            SparseConfig(TENTH, target_modules=["q_proj"], parameters=["gain"]),
            "it has no parameter gain",
        ),
    ],
)
def test_adapt_refuses_and_leaves_the_model_as_it_was(config, words):
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        peftkern.adapt(model, config)
    assert_unchanged(model, before)


def test_a_failure_half_way_is_undone(monkeypatch):
    from peftkern.sparse import placing

    model = toy()
    before, kinds = snapshot(model), [type(m) for m in model.modules()]
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return put_on(*args)

    put_on = placing.put_on
    monkeypatch.setattr(placing, "put_on", failing)
    with pytest.raises(MemoryError):
        peftkern.adapt(model, SparseConfig(TENTH))
    assert_unchanged(model, before)
    assert [type(m) for m in model.modules()] == kinds
