"""Sparse adapters on disk: small, exact, and of one base alone."""

import json

import pytest
import safetensors.torch
import torch
from models import assert_unchanged, snapshot, tokens, toy
from sparse_models import BATCHES, zoo
from test_sparse_adapt import TENTH, moved

import peftkern
from peftkern import LoraConfig, SparseConfig
from peftkern.sparse import Pattern, SaraAdamW, SmallestFraction
from peftkern.sparse.support import supports

FORMS = ["value", "delta"]


def saved(path, form="value", **options):
    model = moved(peftkern.adapt(toy(**options), SparseConfig(TENTH, form)))
    peftkern.save_adapter(model, path)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_adapter_makes_the_same_model_of_the_base(form, tmp_path):
    model = saved(tmp_path, form)
    wanted = model(tokens())
    others = [toy(), moved(peftkern.adapt(toy(), SparseConfig(SmallestFraction(0.02), form)), 9)]
    for other in others:  # which has none, or one with other entries
        peftkern.load_adapter(other, tmp_path)
        assert torch.equal(other(tokens()), wanted)
        for mine, theirs in zip(supports(other), supports(model), strict=True):
            assert torch.equal(mine.values, theirs.values)
            assert mine.pattern.hash == theirs.pattern.hash
        peftkern.save_adapter(other, tmp_path / "again")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    peftkern.unmerge(peftkern.merge(others[1]))  # the base of the second was restored in between
    for support in supports(others[1]):
        assert torch.equal(support.weight.detach(), toy().get_parameter(support.name).detach())


def test_a_file_takes_six_bytes_a_weight_and_four_a_row(tmp_path):
    model = saved(tmp_path)
    entries = sum(s.pattern.nnz for s in supports(model))
    rows = sum(s.pattern.shape[0] + 1 for s in supports(model))
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == 6 * entries + 4 * rows
    name = "layers.0.q_proj.weight"
    kinds = {"values": torch.float32, "columns": torch.uint16, "row_start": torch.int32}
    assert {k: tensors[f"{name}.{k}"].dtype for k in kinds} == kinds
    (entry,) = json.loads((tmp_path / "adapter_config.json").read_text())["adapters"]
    assert entry["config"] == {
        "form": "value",
        "parameters": ["weight"],
        "rule": {"rule": "SmallestFraction", "fraction": 0.1, "scope": "global"},
    }
    assert all(len(found["weight"]) == 16 for found in entry["bases"].values())


def test_a_merged_model_and_one_that_has_written_save_the_same_file(tmp_path):
    model = saved(tmp_path)
    wanted = (tmp_path / "adapter_config.json").read_bytes()
    model(tokens())
    peftkern.save_adapter(peftkern.merge(model), tmp_path / "merged")
    assert (tmp_path / "merged" / "adapter_config.json").read_bytes() == wanted
    peftkern.load_adapter(toy(), tmp_path / "merged")


def test_the_hash_is_of_dtype_shape_and_bytes():
    from peftkern.sparse.stored import base_hash

    weight = torch.arange(6.0)
    hashes = {
        base_hash(w)
        for w in (weight, weight.view(2, 3), weight.half(), weight.bfloat16(), weight + 1)
    }
    assert len(hashes) == 5
    spread = torch.empty(3, 2).t().copy_(weight.view(2, 3))
    assert base_hash(spread) == base_hash(weight.view(2, 3))


def changed(model, how):
    weight = model.layers[1].q_proj.weight
    with torch.no_grad():
        if how == "one bit":
            weight.view(-1)[5] = torch.nextafter(weight.view(-1)[5], torch.tensor(9.0))
        elif how == "the dtype":
            model.bfloat16()
    return model


@pytest.mark.parametrize("how", ["one bit", "the dtype"])
@pytest.mark.parametrize("there", [False, True], ids=["no adapter", "an adapter"])
def test_another_base_is_refused_before_anything_changes(how, there, tmp_path):
    saved(tmp_path)
    model = changed(toy(), how)
    if there:
        model = moved(peftkern.adapt(model, SparseConfig(TENTH)))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"weight must be the base that the adapter belongs to"):
        peftkern.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("columns", lambda t: t.int().flip(0), "columns must rise within each row"),
        ("columns", lambda t: t.int() + 100, r"columns must lie in \[0, 32\)"),
        ("columns", lambda t: t[:-1], "row_start must rise"),
        ("row_start", lambda t: t.flip(0), "row_start must rise"),
        ("row_start", lambda t: t[:-1], r"row_start must have shape \[33\]"),
        ("values", lambda t: t[:-1], r"values must have shape"),
        ("values", lambda t: t.long(), None),
        ("columns", lambda t: t.float(), "columns must be uint16 or int32"),
        ("values", None, "must have weight.values"),
    ],
)
def test_a_spoiled_file_is_refused_before_anything_changes(part, change, words, tmp_path):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    key = f"layers.0.q_proj.weight.{part}"
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors[key]).contiguous()
    safetensors.torch.save_file(tensors, file)
    model = toy()
    before, kinds = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises((ValueError, TypeError), match=words):
        peftkern.load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    assert [type(m) for m in model.modules()] == kinds


def test_another_form_is_refused(tmp_path):
    saved(tmp_path)
    model = peftkern.adapt(toy(), SparseConfig(TENTH, "delta"))
    with pytest.raises(ValueError, match="must be what adapter_config.json says, got form 'value'"):
        peftkern.load_adapter(model, tmp_path)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_what_an_optimizer_has_trained_of_a_whole_model_is_saved(tied, tmp_path):
    model = zoo(tied=tied)
    optimizer = SaraAdamW(model, 0.05, lr=1e-2, progressive_iter=2)
    for tokens_, targets in BATCHES:
        model(tokens_).flatten(0, 1).gather(1, targets.reshape(-1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    stopped = [s for s in supports(model) if s.state.origin.nnz > s.pattern.nnz]
    assert stopped  # what they have learned is in the file as well
    peftkern.save_adapter(model, tmp_path)
    other = peftkern.load_adapter(zoo(tied=tied), tmp_path)
    assert torch.equal(other(BATCHES[0, 0]), model(BATCHES[0, 0]))
    names = [s.name for s in supports(other)]
    assert names == [s.name for s in supports(model)] and "loose" in names
    if tied:
        assert "head.weight" not in names


def test_lora_and_sparse_adapters_stand_in_one_file(tmp_path):
    configs = (LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
               SparseConfig(TENTH))  # fmt: skip
    model = moved(peftkern.adapt(toy(), configs))
    peftkern.save_adapter(model, tmp_path)
    other = peftkern.load_adapter(toy(), tmp_path)
    assert torch.equal(other(tokens()), model(tokens()))


def test_entries_beyond_sixteen_bits_have_wider_columns(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(70000, 2, bias=False))
    weight = model[0].weight.detach().clone()
    pattern = Pattern.from_indices(torch.tensor([0, 1]), torch.tensor([69999, 3]), (2, 70000))
    peftkern.adapt(model, SparseConfig({"0.weight": pattern}))
    moved(model)
    peftkern.save_adapter(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["0.weight.columns"].dtype == torch.int32
    other = torch.nn.Sequential(torch.nn.Linear(70000, 2, bias=False))
    other[0].weight.data = weight
    peftkern.load_adapter(other, tmp_path)
    x = torch.randn(1, 70000)
    assert torch.equal(other(x), model(x))
