"""DoRA, trained biases and starts that are taken off again, on disk: to peft and back."""

import copy

import peft
import pytest
import safetensors.torch
import torch
import transformers
from models import (
    adapted,
    assert_same_outputs,
    assert_unchanged,
    disturb,
    snapshot,
    tokens,
    toy,
)

import peftkern
from peftkern import LoraConfig, QLoRALinear

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAMES = ["q_proj", "0.gate_proj"]

VARIANTS = [
    dict(use_dora=True),
    dict(use_dora=True, use_rslora=True, rank_pattern={"0.q_proj": 2}),
    dict(bias="lora_only"),
    dict(bias="lora_only", use_dora=True, alpha_pattern={"0.gate_proj": 3}),
]
SPLIT = [
    dict(init_lora_weights="pissa"),
    dict(init_lora_weights="olora", use_rslora=True),
    dict(init_lora_weights="pissa_niter_2", use_dora=True, bias="lora_only"),
    dict(init_lora_weights="pissa", use_rslora=True, rank_pattern={"0.q_proj": 2}),
    dict(init_lora_weights="olora", alpha_pattern={"1.q_proj": 5}, rank_pattern={"1.q_proj": 3}),
]


def config(**options):
    return LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, **options)


def from_peft(path):
    return peft.PeftModel.from_pretrained(toy(), path).eval()


@pytest.mark.parametrize("options", VARIANTS + SPLIT)
def test_peft_reads_what_we_write_over_the_base_as_it_was(options, tmp_path):
    model = adapted(config(**options))
    peftkern.save_adapter(model, tmp_path)
    for other in (from_peft(tmp_path), peftkern.load_adapter(toy(), tmp_path)):
        torch.testing.assert_close(other(tokens()), model(tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", VARIANTS)
def test_we_read_what_peft_writes_and_compute_the_same(options, tmp_path):
    theirs = peft.get_peft_model(
        toy(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, **options)
    )
    disturb(theirs).eval().save_pretrained(tmp_path)
    model = peftkern.load_adapter(toy(), tmp_path)
    assert_same_outputs(model, theirs)
    peftkern.save_adapter(model, tmp_path / "again")
    theirs, ours = (
        safetensors.torch.load_file(path / TENSORS) for path in (tmp_path, tmp_path / "again")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_what_peft_has_converted_to_an_ordinary_adapter_is_read(tmp_path):
    """A user of peft saves the start first, then the trained adapter as its difference."""
    theirs = peft.get_peft_model(
        toy(),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, init_lora_weights="pissa"),
    )
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    disturb(theirs).save_pretrained(
        tmp_path / "trained", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    model = peftkern.load_adapter(toy(), tmp_path / "trained")
    theirs.set_adapter("default")
    torch.testing.assert_close(model(tokens()), theirs.eval()(tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("options", VARIANTS + SPLIT)
def test_training_goes_on_where_it_was_saved(options, base, tmp_path):
    model = adapted(config(base=base, **options))
    peftkern.save_adapter(model, tmp_path)
    again = adapted(config(base=base, **options | {"alpha_pattern": {}}), seed=5)
    peftkern.load_adapter(again, tmp_path)
    assert torch.equal(again(tokens()), model(tokens()))
    ours, theirs = (dict(m.named_parameters()) for m in (model, again))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(torch.equal(ours[name], theirs[name]) for name in trained)
    buffers = dict(again.named_buffers())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_the_rank_in_the_file_is_that_of_the_difference(tmp_path):
    model = adapted(config(init_lora_weights="pissa", use_dora=True, bias="lora_only"))
    layer = model.layers[0].q_proj
    state = peftkern.adapter_state_dict(model)
    key = "base_model.model.layers.0.q_proj."
    a, b = state[f"{key}lora_A.weight"], state[f"{key}lora_B.weight"]
    assert torch.equal(a, torch.cat([layer.lora_A, layer.initial_A]))
    assert torch.equal(b, torch.cat([layer.lora_B, -layer.initial_B], 1))
    assert state[f"{key}lora_magnitude_vector"].shape == (32,)
    assert torch.equal(state[f"{key}base_layer.bias"], layer.bias)
    report = peftkern.report(model)
    assert report.rows[0].vllm == "no: DoRA"
    stored = [layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    stored += [layer.initial_A, layer.initial_B]
    assert report.rows[0].bytes == sum(t.nbytes for t in stored)
    pissa = peftkern.report(peftkern.adapt(toy(), LoraConfig(r=12, init_lora_weights="pissa")))
    assert pissa.rows[0].vllm == "yes, with max_lora_rank >= 24"


def test_magnitudes_with_and_without_the_ending_weight_are_read(tmp_path):
    model = adapted(config(use_dora=True))
    peftkern.save_adapter(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSORS)
    renamed = {k + ".weight" * k.endswith("vector"): v for k, v in tensors.items()}
    (tmp_path / TENSORS).write_bytes(safetensors.torch.save(renamed))
    assert_same_outputs(peftkern.load_adapter(toy(), tmp_path), model)


def dropped(ending):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(ending)}


def lengthened(ending):
    return lambda tensors: {
        k: torch.cat([v, v]) if k.endswith(ending) else v for k, v in tensors.items()
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dropped("q_proj.lora_magnitude_vector"), "must have a lora_magnitude_vector"),
        (dropped("lora_magnitude_vector"), "must have a lora_magnitude_vector"),
        (lengthened("1.q_proj.lora_magnitude_vector"), r"lora_magnitude_vector must .* \[32\]"),
        (lengthened("1.q_proj.base_layer.bias"), r"1\.q_proj\.bias must have shape \[32\]"),
        (
            lambda tensors: {k.replace("q_proj.base", "0.gate_proj.base"): v
                             for k, v in tensors.items()},
            "must",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fresh", [False, True], ids=["adapted", "fresh"])
def test_magnitudes_and_biases_that_do_not_fit_are_refused(fresh, change, words, tmp_path):
    options = config(use_dora=True, bias="lora_only")
    peftkern.save_adapter(adapted(options), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSORS)
    (tmp_path / TENSORS).write_bytes(safetensors.torch.save(change(tensors)))
    model = toy() if fresh else adapted(options, seed=5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        peftkern.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("saved", "there"),
    [
        (dict(use_dora=True), dict()),
        (dict(), dict(use_dora=True)),
        (dict(), dict(bias="lora_only")),
        (dict(), dict(init_lora_weights="pissa")),
        (dict(init_lora_weights="pissa"), dict()),
    ],
)
def test_an_adapter_of_another_kind_is_refused(saved, there, tmp_path):
    peftkern.save_adapter(adapted(config(**saved)), tmp_path)
    model = adapted(config(**there), seed=5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="must have"):
        peftkern.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_biases_of_a_file_go_into_layers_that_do_not_train_theirs(tmp_path):
    model = adapted(config(bias="lora_only"))
    peftkern.save_adapter(model, tmp_path)
    assert_same_outputs(peftkern.load_adapter(adapted(config(), seed=5), tmp_path), model)


def test_loftq_says_that_its_later_rounds_have_a_base_of_their_own(tmp_path, recwarn):
    once = adapted(config(init_lora_weights="loftq", base="nf4"))
    peftkern.save_adapter(once, tmp_path)
    assert not [w for w in recwarn if "belongs to the base" in str(w.message)]
    again = peftkern.load_adapter(peftkern.adapt(toy(), config(base="nf4")), tmp_path)
    assert torch.equal(again(tokens()), once(tokens()))
    twice = adapted(config(init_lora_weights="loftq_2", base="nf4"))
    with pytest.warns(UserWarning, match="belongs to the base that 'loftq_N' has made"):
        peftkern.save_adapter(twice, tmp_path)


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2_with_its_transposed_weights_goes_to_peft_and_back(dora, tmp_path):
    shape = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=24, n_positions=16)
    plain = transformers.GPT2LMHeadModel(shape).eval()
    options = dict(r=4, use_dora=dora, target_modules=["c_attn", "c_fc"])
    model = disturb(peftkern.adapt(copy.deepcopy(plain), LoraConfig(**options)))
    peftkern.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(tokens()).logits, model(tokens()).logits)
    theirs = disturb(
        peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(fan_in_fan_out=True, **options))
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = peftkern.load_adapter(plain, tmp_path / "theirs")
    assert isinstance(again.transformer.h[0].attn.c_attn, QLoRALinear)
    torch.testing.assert_close(again(tokens()).logits, theirs(tokens()).logits)
