"""The plan of a run's memory: its arithmetic, its advice, the dimensions it falls back on."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bbkit import config, train
from bbkit.machine import memory
from bbkit.runs import dry_run


def peak(settings, **options) -> int:
    return max(part["peak"] for part in memory.plan(settings, torch.float32, **options).values())


def test_parts_of_the_pocket_run_by_hand():
    changed = ["sft.micro_batch_size=4", "model.max_length=100", "retention.rule=none"]
    settings = config.load("pocket", overrides=changed)
    found = memory.plan(settings, torch.float32)["sft"]
    _, sizes = memory.measure(settings.model, torch.float32, offline=True)
    assert found["weights"] == 4 * sizes["parameters"]
    assert found["adapter"] == 4 * sizes["lora_parameters"]
    assert found["optimiser"] == 8 * sizes["lora_parameters"]
    assert found["gradients"] == 4 * sizes["lora_parameters"]
    vocabulary = 4096
    assert found["logits"] == memory.LOGIT["cpu"] * (4 * 100) * vocabulary
    assert found["peak"] == sum(v for k, v in found.items() if k not in ("peak", "kv_cache"))


def test_more_of_anything_takes_more():
    def load(*changes):
        short = ["grpo.max_completion_length=64", "evaluation.max_new_tokens=64"]
        return config.load("smollm2-cpu", overrides=["model.name=pocket", *short, *changes])

    plain = peak(load("model.max_length=128"))
    for change in ("model.max_length=256", "model.lora_rank=64"):
        assert peak(load("model.max_length=128", change)) > plain, change
    base = ["model.max_length=128", "grpo.micro_batch_size=16", "sft.micro_batch_size=8"]
    assert peak(load(*base)) > plain
    assert peak(load(*base, "model.gradient_checkpointing=true")) < peak(load(*base))


def test_each_capability_and_what_retention_holds_is_counted():
    plain, penalty, step = (
        memory.plan(config.load("pocket", overrides=[f"retention.rule={rule}"]), torch.float32)
        for rule in ("none", "penalty", "step")
    )
    for stage in ("sft", "grpo"):
        assert "retention" not in plain[stage]
        assert penalty[stage]["retention"] == plain[stage]["adapter"]
        assert step[stage]["retention"] == 6 * plain[stage]["adapter"]
    assert plain["grpo"]["gradients"] == 4 * plain["grpo"]["adapter"]  # `.grad`, three capabilities


def test_the_logits_of_replies_are_bounded():
    """A vocabulary of 152,064 and 32 long replies a step: no more than one part's logits."""
    words = ["retention.rule=penalty", "retention.per_step=32", "retention.max_new_tokens=256"]
    found = memory.plan(config.load("24gb", overrides=words), torch.bfloat16, "cuda", offline=True)
    plain = memory.plan(config.load("24gb"), torch.bfloat16, "cuda", offline=True)
    most = memory.LOGIT["cuda"] * max(2**25, 152064 * 257)
    assert found["grpo"]["logits"] == max(plain["grpo"]["logits"], most)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1544),
        ("Qwen/Qwen2.5-7B-Instruct", 7616),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134.5),
    ],
)
def test_published_dimensions_give_the_published_size(name, millions, monkeypatch):
    """Parameters as the models' cards on the Hub state them (0.49, 1.54, 7.61 B; 135 M)."""
    seen = {}
    real = memory.sizes

    def noted(*given):
        seen.update(real(*given))
        return seen

    def unreachable(*_):
        raise memory.InputError("no way to the Hub")

    monkeypatch.setattr(memory, "sizes", noted)
    monkeypatch.setattr(memory, "measure", unreachable)
    settings = config.load("24gb", overrides=[f"model.name={name}", "model.revision=null"])
    memory.plan(settings, torch.bfloat16, "cuda")
    assert seen["parameters"] / 1e6 == pytest.approx(millions, rel=0.005)


def test_a_model_that_nobody_knows_is_an_error():
    settings = config.load("pocket", overrides=["model.name=./nowhere"])
    with pytest.raises(memory.InputError, match="no such folder"):
        memory.plan(settings, torch.float32)


def test_advice_is_enough_and_not_too_much():
    settings = config.load("pocket", overrides=["sft.micro_batch_size=32"])
    room = peak(settings) - 1
    changes = dry_run.mend(settings, torch.float32, room)
    assert changes
    values = ["sft.micro_batch_size=32", *changes]
    assert peak(config.load("pocket", overrides=values)) <= room
    assert peak(config.load("pocket", overrides=values[:-1])) > room
    assert dry_run.mend(settings, torch.float32, 1000) == []


@pytest.mark.parametrize(("card", "said"), [("24", "fits: "), ("2", "does not fit: ")])
def test_dry_run_names_the_card(card, said, capsys):
    options = ["--preset", "t4", "--dry-run", "--offline", "--card", card]
    assert train.main(options) == 0
    out = capsys.readouterr().out
    assert said in out and f"of {float(card):.1f} GB card" in out
    assert "memory sft:" in out and "memory grpo:" in out


@pytest.mark.parametrize(
    ("tokens", "published"), [(1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19)]
)
def test_the_plan_is_near_what_others_publish(tokens, published, monkeypatch):
    """QLoRA of LLaMA2-7B, rank 8, one sequence, FlashAttention 2, A100: whole GB, as stated.

    github.com/hiyouga/LLaMA-Factory/wiki/Performance-comparison, "4 bit, all modules".
    """
    llama2 = (4096, 32, 32, 32, 11008, 32000, False, 16384)  # positions: as far as they went
    monkeypatch.setitem(memory.PUBLISHED, "meta-llama/Llama-2-7b-hf", llama2)
    asked = {
        "model.name": "meta-llama/Llama-2-7b-hf", "model.max_length": tokens, "model.lora_rank": 8,
        "sft.micro_batch_size": 1,
    }  # fmt: skip
    settings = config.load("24gb", overrides=[f"{k}={v}" for k, v in asked.items()])
    found = memory.plan(settings, torch.bfloat16, "cuda", offline=True)["sft"]["peak"]
    assert found == pytest.approx(published * 1e9, rel=0.1)


def qwen_7b(*changes):
    short = ["evaluation.max_new_tokens=64", "evaluation.ifeval_tokens=64"]
    return config.load("24gb", overrides=[*short, *changes])


def test_grpo_of_qwen_7b_takes_what_trl_publishes():
    """~9.2 GiB on a T4: huggingface/trl, examples/notebooks/grpo_trl_lora_qlora.ipynb.

    Rank 32, 8 completions of 256 tokens (prompts, whose length is not stated, taken as 144),
    checkpointing, 8-bit Adam. There, what is not in 4 bit is in float32, the rest computes in 16
    bit; Liger's loss holds one sequence's logits; there is one gradient; CUDA's context is not in
    the figure.
    """
    settings = qwen_7b(
        "model.lora_rank=32", "model.max_length=400", "grpo.prompts=1", "grpo.generations=8",
        "grpo.micro_batch_size=8", "grpo.max_completion_length=256",
    )  # fmt: skip
    full, half = (
        memory.plan(settings, dtype, "cuda", offline=True)["grpo"]
        for dtype in (torch.float32, torch.float16)
    )
    found = full["weights"] + 2 * half["adapter"] + half["optimiser"] + half["activations"]
    assert found + half["logits"] / 8 == pytest.approx(9.2 * 2**30, rel=0.1)


def test_sft_of_qwen_7b_takes_what_unsloth_publishes():
    """7.893 GiB reserved on a T4: unslothai/notebooks, nb/Qwen2.5_(7B)-Alpaca.ipynb.

    Rank 16, 2 sequences, checkpointing, 8-bit Adam; replies of Alpaca, taken as 512 tokens at most.
    """
    settings = qwen_7b(
        "model.max_length=512", "sft.micro_batch_size=2", "grpo.max_completion_length=64"
    )
    found = memory.plan(settings, torch.float16, "cuda", offline=True)["sft"]
    assert found["peak"] - found["process"] == pytest.approx(7.893 * 2**30, rel=0.1)


def test_a_plan_refuses_what_the_run_would(capsys):
    options = ["--preset", "t4", "--offline", "--card", "16", "--set", "model.max_length=40000"]
    assert train.main([*options, "--dry-run"]) == 2
    assert "model.max_length 40000: the model has room for 32768" in capsys.readouterr().err
    assert train.main(["--preset", "pocket", "--card", "16"]) == 2
    assert "add --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "card"), [("t4", 16), ("24gb", 24), ("paper", 24)])
def test_a_preset_fits_the_card_that_it_is_for(preset, card):
    settings = config.load(preset)
    dtype = getattr(torch, settings.model.dtype)
    found = memory.plan(settings, dtype, "cuda", offline=True)
    assert max(stage["peak"] for stage in found.values()) < 0.95 * card * 1e9


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone")
def test_a_peak_is_counted_from_where_it_was_forgotten():
    size = 200_000_000
    with mmap.mmap(-1, size) as large:  # no bytearray: bbkit.machine.cpu may keep what that frees
        for page in range(0, size, mmap.PAGESIZE):
            large[page] = 1
        before = memory.peak_bytes()
    assert before > size
    memory.forget_peak()
    assert memory.peak_bytes() < before - 150_000_000


def test_a_small_process_started_by_a_large_one_has_a_small_peak():
    """Linux' rusage hands the parent's peak on: all figures of a benchmark would be the same."""
    code = (
        "import subprocess, sys\nheld = bytearray(1_000_000_000)\n"
        "said = 'from bbkit.machine import memory; print(memory.peak_bytes())'\n"
        "print(subprocess.run([sys.executable, '-c', said], capture_output=True).stdout.decode())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(found.stdout) < 6e8


def test_a_peak_is_the_gpus_where_there_is_work_on_it(monkeypatch):
    forgotten = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: forgotten.append(True))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    memory.forget_peak()
    assert forgotten and memory.peak_gib() == 3.0
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)  # model.device=cpu
    assert 0 < memory.peak_gib() != 3.0
