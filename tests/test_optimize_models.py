"""`optimize` on models of transformers and pipelines of diffusers, built small from configs."""

import diffusers
import peft
import pytest
import torch
import transformers
from models import disturb
from needs import needs_kernels
from peft_models import linear4bit

import peftkern
from peftkern import _swapped

pytestmark = needs_kernels

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def language_model(base, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    if base:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if name in LINEARS:
                    setattr(module, name, linear4bit(child))
        model.is_loaded_in_4bit = True
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    return disturb(peft.get_peft_model(model, lora))


def swapped(model):
    return [n for n, m in model.named_modules() if isinstance(m, _swapped.Swapped)]


@pytest.mark.parametrize("base", [None, "nf4"])
def test_generate_gives_the_same_tokens(base):
    model = language_model(base)
    prompt = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(3))
    options = dict(max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))
    model.train()  # in eval mode bitsandbytes would repack its weights on some CPUs
    theirs = model.generate(input_ids=prompt, **options)
    report = peftkern.optimize(model)
    assert len(report.rows) == (14 if base else 4) and report.skipped == []
    assert torch.equal(model.generate(input_ids=prompt, **options), theirs)
    assert torch.equal(model.eval().generate(input_ids=prompt, **options), theirs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", [None, "nf4"])
def test_the_trainer_takes_the_same_steps(base, checkpointing, tmp_path):
    tokens = torch.randint(1, 64, (6, 8), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def trained(optimized):
        model = language_model(base)
        if optimized:
            peftkern.optimize(model)
        if checkpointing:
            model.enable_input_require_grads()
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
            seed=0, gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, peft.get_peft_model_state_dict(model), model

    ours, theirs = trained(True), trained(False)
    assert len(ours[0]) == 3 and swapped(ours[2]) and not swapped(theirs[2])
    assert ours[0] == pytest.approx(theirs[0], abs=2e-4)
    assert list(ours[1]) == list(theirs[1])
    for name in ours[1]:
        torch.testing.assert_close(ours[1][name], theirs[1][name], rtol=1e-3, atol=1e-4)


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip


def encoder():
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=64, max_position_embeddings=16, projection_dim=32,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def with_lora(model, *targets):
    model.add_adapter(peft.LoraConfig(r=4, target_modules=list(targets)))
    return disturb(model)


class Pipeline(diffusers.DiffusionPipeline):
    def __init__(self, unet, text_encoder, scheduler):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, scheduler=scheduler)


def test_a_pipeline_of_diffusers_is_taken_by_its_components():
    pipe = Pipeline(
        with_lora(unet(), "to_q", "to_v", "to_out.0"), with_lora(encoder(), "q_proj"),
        diffusers.DDIMScheduler(),
    )  # fmt: skip
    sample, text = torch.randn(2, 4, 8, 8), torch.randint(1, 64, (2, 6))

    def run():
        states = pipe.text_encoder(text).last_hidden_state
        return pipe.unet(sample, 3, states).sample

    expected = run()
    layers = [
        f"{part}.{name}"
        for part in ("unet", "text_encoder")
        for name, module in getattr(pipe, part).named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    ]
    report = peftkern.optimize(pipe)
    assert report.skipped == [] and len(layers) == 25
    assert [row.name for row in report.rows] == layers
    assert report.parameters > sum(p.numel() for p in pipe.unet.parameters())
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
    loss = run().square().mean()
    loss.backward()
    assert all(p.grad is not None for n, p in pipe.unet.named_parameters() if "lora_" in n)
    pipe.unet.set_adapter("default")
    pipe.unet.disable_adapters()
    bare = run()
    pipe.unet.enable_adapters()
    assert not torch.equal(bare, expected)
    peftkern.restore(pipe)
    assert not swapped(pipe.unet) and not swapped(pipe.text_encoder)
    assert torch.equal(run(), expected)


def test_a_lora_that_is_fused_and_taken_out_again():
    model = with_lora(unet(), "to_q", "to_v")
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 32)
    expected = model(sample, 3, states).sample
    peftkern.optimize(model)
    for change in (model.fuse_lora, model.unfuse_lora):
        change()
        torch.testing.assert_close(model(sample, 3, states).sample, expected, rtol=1e-3, atol=1e-4)
    assert len(swapped(model)) == 16
