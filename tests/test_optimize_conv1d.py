"""LoRA of peft on transformers' Conv1D, whose weight is `[in, out]`."""

import copy

import peft
import pytest
import torch
import transformers
from close import assert_as_good
from models import disturb
from needs import needs_kernels
from peft_models import dense, dora_truth, magnitude, parts, runs_ours, truth
from saved import Saved
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern import _swapped, qlora
from peftkern.qlora import transposed

pytestmark = needs_kernels

TARGETS = ["c_attn", "c_proj", "c_fc"]


def gpt2(registered=False, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=4, vocab_size=64, n_positions=32, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(dtype)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, fan_in_fan_out=True, task_type="CAUSAL_LM",
        **options,
    )  # fmt: skip
    if registered:
        peftkern.register(config)
    return disturb(peft.get_peft_model(model, config)).train()


def layer(model, name="attn.c_attn"):
    return model.get_submodule(f"base_model.model.transformer.h.0.{name}")


def prompt():
    return torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(3))


def results(model, x):
    torch.manual_seed(1)
    inputs = [p for p in model.parameters() if p.requires_grad]
    inputs += [x] * x.requires_grad
    y = model(x).logits if isinstance(model, peft.PeftModel) else model(x)
    return [y, *torch.autograd.grad(y.square().mean(), inputs)]


def assert_alike(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("registered", [False, True])
def test_a_model_computes_and_trains_what_it_did(options, registered):
    model, ours = gpt2(**options), gpt2(registered, **options)
    if not registered:
        report = peftkern.optimize(ours)
        assert len(report.rows) == 8 and report.skipped == []
    assert sum(isinstance(m, _swapped.Swapped) for m in ours.modules()) == 8
    assert runs_ours(layer(ours)) and "144 x 48 in float32" in peftkern.explain(layer(ours))
    assert_alike(results(ours, prompt()), results(model, prompt()))
    peftkern.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(ours(prompt()).logits, model(prompt()).logits)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_a_registered_config_that_does_not_say_so_is_set_right():
    config = peft.LoraConfig(r=4, target_modules=["0"])
    peftkern.register(config)
    model = peft.get_peft_model(nn.Sequential(Conv1D(24, 16)), config)
    one = model.base_model.model[0]
    assert isinstance(one, _swapped.Lora) and one.fan_in_fan_out and one.is_target_conv_1d_layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_output_is_the_base_plus_the_adapter(dtype, use_dora):
    model = gpt2(dtype=dtype, use_dora=use_dora)
    peftkern.optimize(model)
    for name in ("attn.c_attn", "mlp.c_proj"):
        one = layer(model, name)
        x = torch.randn(2, 5, one.base_layer.nx).to(dtype)
        assert runs_ours(one)

        if use_dora:
            operands = (*parts(one), magnitude(one).detach())
            assert_as_good(one(x).detach(), dora_truth, x, *operands)
        else:
            assert_as_good(one(x).detach(), truth, x, *parts(one))


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_drops_and_its_gradient_drops_the_same(use_dora):
    model = gpt2(lora_dropout=0.5, use_dora=use_dora)
    peftkern.optimize(model)
    one = layer(model)
    x = torch.randn(40, 48, requires_grad=True)

    def run(seed, x):
        torch.manual_seed(seed)
        return one(x)

    y = run(1, x)
    assert torch.equal(y, run(1, x)) and not torch.equal(y, run(2, x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    with torch.no_grad():  # linear in x while the same elements are dropped
        step = torch.randn_like(x)
        change = run(1, x + step) - y
    torch.testing.assert_close(change.sum(), (grad * step).sum(), rtol=1e-3, atol=1e-3)
    model.eval()
    with torch.no_grad():
        twin = copy.deepcopy(one)
        peftkern.restore(twin)
        torch.testing.assert_close(one(x), twin(x), rtol=1e-4, atol=1e-4)


def test_several_adapters_run_at_once_and_a_mixed_batch_is_left_to_peft():
    model = gpt2()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS, fan_in_fan_out=True))
    disturb(model)
    model.base_model.set_adapter(["default", "second"])
    one, x = layer(model), torch.randn(2, 48, requires_grad=True)
    theirs = results(one, x)
    peftkern.optimize(model)
    assert runs_ours(one)
    assert_alike(results(one, x), theirs)
    assert "stored transposed" in peftkern._conditions.why_not(one, x, ["second", "second"])
    names = ["second", "__base__"]
    assert_as_good(one(x, adapter_names=names)[1].detach(), truth, x[1], *parts(one, []))


def test_merging_is_that_of_peft():
    model, x = gpt2(), torch.randn(2, 48)
    peftkern.optimize(model)
    one = layer(model)
    before = one(x)
    model.merge_adapter()
    assert "no adapter is at work" in peftkern.explain(one)
    torch.testing.assert_close(one(x), before)
    model.unmerge_adapter()
    assert runs_ours(one)
    torch.testing.assert_close(one(x), before)
    logits = model(prompt()).logits
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(merged(prompt()).logits, logits, rtol=1e-4, atol=1e-4)


class Copies(TorchDispatchMode):
    """Outputs of the weight's size that are no view of it."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.found = weight, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.weight.numel():
                if tensor.data_ptr() != self.weight.data_ptr():
                    self.found.append(func)
        return out


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_weight_is_never_copied(dropout, use_dora):
    model = gpt2(lora_dropout=dropout, use_dora=use_dora)
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(3, 48, requires_grad=True)
    assert dense(one).data_ptr() == one.base_layer.weight.data_ptr()
    for _ in range(2):
        with Copies(one.base_layer.weight) as copies:
            one(x).sum().backward()
    # The first call of DoRA asks for the norms of the rows.
    assert copies.found == []


def test_dropout_keeps_no_masked_copy_of_the_input():
    model = gpt2(dtype=torch.bfloat16, lora_dropout=0.5)
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(20, 48, dtype=torch.bfloat16, requires_grad=True)
    with Saved([x, *one.parameters()]) as saved:
        one(x).sum().backward()
    small = 4 * 4 * 48 * 2 + 4 * 4 * 144 + 20 * 4 * 8  # a base of zeros, casts of B, x A^T
    assert saved.bytes <= small < x.nbytes + small


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_it_compiles_whole(backend, use_dora):
    model = gpt2(use_dora=use_dora)
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(6, 48, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(one, fullgraph=True, backend=backend)
    y, eager = compiled(x), one(x)
    torch.testing.assert_close(y, eager)
    inputs = [x, *(p for p in one.parameters() if p.requires_grad)]
    for a, b in zip(*(torch.autograd.grad(t.sum(), inputs) for t in (y, eager)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_output_has_the_dtype_that_it_had(autocast):
    model, x = gpt2(), torch.randn(3, 48)
    one = layer(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = one(x)
        peftkern.optimize(model)
        ours = one(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_generate_gives_the_same_tokens():
    model = gpt2().eval()
    options = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(prompt()))
    theirs = model.generate(input_ids=prompt(), **options)
    peftkern.optimize(model)
    assert torch.equal(model.generate(input_ids=prompt(), **options), theirs)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_gradient(dropout):
    torch.manual_seed(0)
    shapes = [(3, 5), (5, 7), (7,), (2, 5), (7, 2)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def run(x, stored, bias, a, b):
        torch.manual_seed(1)
        return transposed.linear(x, stored.t(), bias, a, b, 0.5, dropout)

    assert torch.autograd.gradcheck(run, leaves)
    x, stored, *rest = leaves
    torch.manual_seed(1)
    rows = qlora.linear(x, stored.t().contiguous(), *rest, 0.5, dropout)
    torch.testing.assert_close(run(*leaves), rows)
