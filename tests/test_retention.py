"""Anchors are made once, and SFT with them never raises their loss to first order."""

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from bbkit import adapters, config, instructions, models, prompts, questions, retention, sft

GENERAL = instructions.examples("train", per_kind=1, kinds=instructions.SEEN)[:4]


@pytest.fixture
def pocket():
    settings = config.load("pocket", None, ["model.lora_rank=4"]).model
    model, tokenizer = models.load(settings, say=lambda line: None)
    return adapters.add_lora(model, settings, 0), tokenizer


def test_anchors_are_made_once(pocket, tmp_path):
    path = tmp_path / "anchors.jsonl"
    made = retention.anchors(path, *pocket, GENERAL, 8, 4000)
    assert [e for e, _ in made] == GENERAL and any(reply for _, reply in made)
    assert retention.anchors(path, None, None, GENERAL, 8, 4000) == made
    many = instructions.examples("train", per_kind=20, kinds=instructions.SEEN)
    some = [e for e, _ in retention.anchors(tmp_path / "b.jsonl", *pocket, many, 1, 4000)]
    assert len(some) == 64 and {e.entity for e in some} == set(instructions.SEEN)


def test_the_loss_is_that_of_the_replies_alone(pocket):
    model, tokenizer = pocket
    replies = ["yes", "a longer reply of some words", "", "no"]
    one = retention.loss(tokenizer, list(zip(GENERAL, replies, strict=True)), 2, 256, seed=0)
    assert one(model, 3) == one(model, 3) != one(model, 4)
    whole = retention.loss(
        tokenizer, list(zip(GENERAL, replies, strict=True))[1:2], 8, 256, seed=0
    )(model, 0)
    turns = tokenizer.apply_chat_template(
        prompts.messages(GENERAL[1]), add_generation_prompt=True, tokenize=False
    )
    start = len(tokenizer(turns, add_special_tokens=False)["input_ids"])
    text = turns + replies[1] + tokenizer.eos_token
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    logits = model(input_ids=ids).logits[0, start - 1 : -1]
    assert whole.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, ids[0, start:]).item(), rel=1e-4
    )


def test_sft_does_not_oppose_the_anchors(pocket, tmp_path):
    model, tokenizer = pocket
    replies = ["yes", "no", "a b c", "ok"]
    kept = retention.loss(tokenizer, list(zip(GENERAL, replies, strict=True)), 4, 256, seed=0)
    steps = []

    class Watched(retention.retaining(SFTTrainer, kept)):
        def training_step(self, *args, **kwargs):
            value = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                parameters = [p for p in self.model.parameters() if p.requires_grad]
                step = torch.cat([p.grad.flatten() for p in parameters])
                found = torch.autograd.grad(kept(self.model, self.state.global_step), parameters)
                anchor = torch.cat([g.flatten() for g in found])
                steps.append(torch.nn.functional.cosine_similarity(step, anchor, dim=0).item())
            return value

    trainer = Watched(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, use_cpu=True,
            bf16=False, learning_rate=5e-3, report_to="none", gradient_accumulation_steps=2,
            completion_only_loss=True, logging_steps=1, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(sft.rows(questions.ontology("validation")[:32])),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert len(steps) == 4 and min(steps) > -1e-4
    row = trainer.state.log_history[-2]
    assert {"cosine/sft/retention", "coefficient/retention", "retention_loss"} <= set(row)
