"""Every tensor is made where the model is: the kit's paths on a device that is not the CPU."""

import pytest
import torch
from conftest import moved
from elsewhere_device import DEVICE, Far, elsewhere

from bbkit import config, models
from bbkit.prompts import Example

ASKED = [
    Example("1", "short", "Which virus?", answer="a virus", entity="e"),
    Example("2", "short", "Name one cause of a long fever.", answer="a worm", entity="f"),
]
REPLY = "<reasoning>It is a virus.</reasoning><answer>a virus</answer>"


def fresh():
    settings = config.load("pocket", None, ["model.lora_rank=2"]).model
    model, tokenizer = models.load(settings, say=lambda line: None)
    return moved(models.add_lora(model, settings, 0)), tokenizer


@pytest.fixture()
def pair():
    model, tokenizer = fresh()
    with elsewhere(model):
        yield model, tokenizer


def test_a_tensor_of_the_cpu_that_meets_one_from_elsewhere_fails():
    far = Far(torch.ones(3))
    with pytest.raises(RuntimeError, match="two devices"):
        far + torch.ones(3)
    assert (far + torch.ones(())).tolist() == [2.0] * 3 and far[torch.tensor([0])].tolist() == [1.0]
    assert far.device == DEVICE and far.sum().item() == 3.0


def test_generation_and_divergence(pair):
    from bbkit.machine import generation

    said = generation.generate(*pair, ASKED, 40, 1000)
    assert len(said) == 2
    assert all(kl >= 0 for kl in generation.divergence(*pair, ASKED, said))


def test_retention_and_the_replies_it_keeps(pair):
    from bbkit import retention
    from bbkit.data import replies

    model, tokenizer = pair
    said = replies.answered(model, tokenizer, ["Name one cause of fever.", "Say no."], 12)
    rows = [(r.prompt_ids + r.reply_ids, len(r.prompt_ids)) for r in said]
    for part in retention.batches(rows, model.config.vocab_size):
        loss = retention.divergence(model, None, part)
        loss.backward()
        assert loss.item() > 0
    assert all(p.grad.device == DEVICE for p in model.parameters() if p.requires_grad)


def test_judge(pair):
    from bbkit.machine import judge

    assert len(judge.judged(*pair, ASKED, [REPLY, REPLY])) == 2


def test_what_is_measured_elsewhere(pair):
    from bbkit.runs import elsewhere as measure

    settings = config.load("pocket", None, ["evaluation.elsewhere=2"])
    texts = measure.texts(settings, None)
    found = measure.measured(*pair, texts, 64)
    assert found and all(x["scores"] for x in found)


def test_benchmark_and_one_pass(pair):
    from bbkit.study import variants

    model, _ = pair
    found = variants.backward_ratios(model.train(), 3, 4, 16, 1)
    assert all(row["both"] > 0 for row in found.values())


def test_export_of_a_model_that_is_elsewhere(pair):
    merged = models.merge(pair[0], torch.float32)
    assert merged.device.type == "cpu" and all(p.isfinite().all() for p in merged.parameters())


@pytest.fixture()
def on_it(monkeypatch):
    """Trainers believe that the device is theirs; they save nothing, since it has no storage."""
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *_, **__: None)

    monkeypatch.setattr(Accelerator, "device", property(lambda self: DEVICE))
    device = property(lambda self: self._setup_devices and DEVICE)
    monkeypatch.setattr(TrainingArguments, "device", device)


SMALL = [
    "retention.rule=step", "retention.per_step=2", "sft.steps=1", "sft.batch_size=4",
    "sft.micro_batch_size=2", "grpo.steps=1", "grpo.prompts=2", "grpo.generations=2",
    "grpo.micro_batch_size=2", "grpo.max_completion_length=8", "grpo.combination=dual_cone",
]  # fmt: skip


@pytest.mark.parametrize("change", ["grpo.metric=step", "grpo.beta=0.1", "grpo.judge=0.5"])
def test_a_step_of_both_stages(pair, on_it, tmp_path, change):
    from bbkit import data, grpo, sft
    from bbkit.data import replies

    model, tokenizer = pair
    settings = config.load("pocket", None, [*SMALL, change])
    kept = replies.answered(model, tokenizer, ["Name one cause of fever.", "Say no."], 12)
    rows = data.load("ontology", "train")[:4]
    for trainer in (
        sft.build(model, tokenizer, rows, settings, tmp_path, replies=kept),
        grpo.build(model, tokenizer, rows[:2], settings, tmp_path, replies=kept),
    ):
        trainer.train()
        [row] = [x for x in trainer.state.log_history if "loss" in x]
        assert row["retention/kl"] >= 0 and row["grad_norm"] == row["grad_norm"]


def test_probe(pair, on_it, tmp_path):
    from bbkit import data, grpo
    from bbkit.study import probe

    model, tokenizer = pair
    less = ["grpo.prompts=4", "grpo.combination=dual_cone", "retention.rule=none"]
    settings = config.load("pocket", None, [*SMALL, *less])
    rows = data.load("ontology", "train")[:4]
    trainer = grpo.build(model, tokenizer, rows, settings, tmp_path)
    batches = probe.samples(trainer)
    trainer.raw_rewards = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert "grpo" in probe.noise(trainer, batches)
