"""QLoRA supervised fine-tuning on TRL's SFTTrainer: the stage that pays the alignment tax.

Gold replies in the kit's grammar, loss on the reply alone. Every field of the trainer's that
unsloth would change without being asked is set here.
"""

import random
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import torch

from bbkit import prompts
from bbkit.config import Settings
from bbkit.data.replies import Reply
from bbkit.machine import processes
from bbkit.prompts import Example


def rows(examples: Sequence[Example]) -> list[dict]:
    """TRL's conversational prompt-completion rows.

    >>> rows([Example("1", "short", "Cause?", answer="virus")])[0]["completion"][0]["role"]
    'assistant'
    """
    return [
        {
            "prompt": prompts.messages(e),
            "completion": [{"role": "assistant", "content": prompts.completion(e)}],
        }
        for e in examples
    ]


def precision(model) -> dict:
    """The trainer's bf16/fp16 fields: on a CPU none, else what the model computes in."""
    on_gpu = next(model.parameters()).is_cuda
    kinds = {p.dtype for p in model.parameters() if on_gpu}
    return {"use_cpu": not on_gpu, "bf16": torch.bfloat16 in kinds, "fp16": torch.float16 in kinds}


def arguments(section, settings: Settings, folder: Path) -> dict:
    """The TrainingArguments fields that SFT and GRPO share, from their section of the settings."""
    return {
        "output_dir": str(folder),
        "max_steps": section.steps,
        "per_device_train_batch_size": section.micro_batch_size,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.scheduler,
        "warmup_steps": section.warmup_steps,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": section.optimizer,
        "gradient_checkpointing": settings.model.gradient_checkpointing,
        "seed": settings.run.seed,
        "data_seed": settings.run.seed,
        "save_steps": section.save_steps,
        "save_total_limit": 2,
        "logging_steps": settings.run.log_steps,
        "report_to": settings.run.report_to,
        "disable_tqdm": True,
        # NaN must reach `callback.Recorder`: the default replaces it in the log by the last mean.
        "logging_nan_inf_filter": False,
        "auto_find_batch_size": False,
        "torch_empty_cache_steps": None,
        "dataloader_pin_memory": False,
    }


def mixed(
    tokenizer, examples: Sequence[Example], replies: Sequence[Reply], share: float, seed: int
) -> list:
    """Rows as tokens, `share` of them replies of the base, drawn of all; again where too few."""
    encoded = [prompts.encode(tokenizer, e, prompts.completion(e)) for e in examples]
    count = round(len(encoded) * share / (1 - share))
    drawn = random.Random(seed).sample(replies, len(replies))  # they come kind by kind
    often = islice(cycle(drawn), count)
    encoded += [(r.prompt_ids + r.reply_ids, len(r.prompt_ids)) for r in often]
    return [
        {"input_ids": ids, "completion_mask": [0] * asked + [1] * (len(ids) - asked)}
        for ids, asked in encoded
    ]


def build(
    model, tokenizer, examples: Sequence[Example], settings: Settings, folder: Path, callbacks=(),
    replies: Sequence[Reply] = (),
):  # fmt: skip
    """An SFTTrainer over `examples`, in an order fixed by the seed, for a model with its LoRA on.

    Prompt tokens carry no loss; the end token does, since padding has a token of its own (a model
    whose pad is its end never learns to stop). `replies` are those of the base, which retention
    keeps and replay mixes in.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from bbkit import retention
    from bbkit.models import keep_float32

    section = settings.sft
    passes = processes.share(section.batch_size, section.micro_batch_size, "sft")
    config = SFTConfig(
        **arguments(section, settings, folder),
        **precision(model),
        gradient_accumulation_steps=passes,
        max_length=settings.model.max_length,
        completion_only_loss=True,
        padding_free=False,
        loss_type=section.loss_type,
        eos_token=tokenizer.eos_token,
    )
    trainer = retention.around(SFTTrainer, settings, "sft", replies)
    data = rows(examples)
    if section.replay:
        data = mixed(tokenizer, examples, replies, section.replay, settings.run.seed)
    with keep_float32(model):
        return trainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
