"""Shared fixtures, and what several tests start from."""

import gc
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # tests side by side: before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"


# A whole run of pocket in seconds; what comes after it counts.
TINY = [
    f"--set={item}"
    for item in (
        "sft.steps=2", "sft.batch_size=8", "sft.micro_batch_size=8", "grpo.steps=2",
        "grpo.prompts=4", "grpo.generations=4", "grpo.micro_batch_size=16", "run.threads=1",
        "evaluation.questions=6", "evaluation.instructions=6", "evaluation.max_new_tokens=16",
        "evaluation.bootstrap=50", "evaluation.elsewhere=3", "retention.replies=32",
        "retention.per_step=4", "data.limits.sft=60",
    )
]  # fmt: skip

# What python -m bbkit.benchmark takes for its two forms, short.
PASSES = "--capabilities 2 --rank 4 --sequences 2 --tokens 17 --rounds 1".split()
STEPS = ["--retention", "--rounds", "1", "--replies", "2", "--set", "retention.max_new_tokens=8"]
STEPS += ["--set", "data.limits.sft=20", "--set", "data.limits.grpo=20"]
STEPS += ["--set", "sft.batch_size=4", "--set", "sft.micro_batch_size=2", "--set", "grpo.prompts=2"]
STEPS += ["--set", "grpo.generations=2", "--set", "grpo.micro_batch_size=2"]
STEPS += ["--set", "grpo.max_completion_length=8", "--set", "model.lora_rank=4"]


def moved(model, spread: float = 0.05, seed: int = 0):
    """The model with LoRA's B matrices off 0, where the adapter does nothing and A cannot learn."""
    import torch

    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    return model


@pytest.fixture(scope="module", autouse=True)
def settled():
    """What is imported stays: each training begins with a full collection, half a second of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without figures, which take a second: for runs whose figures nobody looks at."""
    monkeypatch.setattr("bbkit.runs.report.draw", lambda folder: {})


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of upstream data files: BBKIT_DATA_DIR, or shared/data beside the checkout."""
    folder = os.environ.get("BBKIT_DATA_DIR")
    path = Path(folder) if folder else Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no upstream data: set BBKIT_DATA_DIR, laid out as data_cards/README.md says")
    return path


@pytest.fixture(scope="session")
def tokenizer():
    """The pocket model's tokenizer."""
    from bbkit import config, models

    return models.load(config.load("pocket").model, say=lambda line: None)[1]


@pytest.fixture(scope="session")
def writer(tokenizer):
    """A tiny model that has learned whole conversations, users' turns included."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        tie_word_embeddings=True, initializer_range=0.08, bos_token_id=None, eos_token_id=1,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(settings)
    names = ["rib", "virus", "worm", "fever", "liver", "cough"]
    rows = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": f"{ask} {a} and {b}."},
                {"role": "assistant", "content": a},
            ],
            tokenize=False,
        )
        for a in names for b in names for ask in ("Choose from", "Name one of")
    ]  # fmt: skip
    batch = tokenizer(rows, return_tensors="pt", padding=True, add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(60):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
