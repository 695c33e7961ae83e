"""`capability_aware` and `keeping` in scripts as people write them: TRL's own, and nothing else.

Model, data and a reward model by their names, here folders; LoRA from the command line, a split to
evaluate on while training, rewards by import path, checkpoints, and a resume.
"""

import json
import sys

import pytest
import torch
import trl
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl.scripts import grpo, sft

from bbkit import config, models
from bbkit.capability import capability_aware
from bbkit.retention import keeping

MINE = """
def brief(completions, **_):
    return [1 / (1 + len(turns[0]["content"])) for turns in completions]

def vowels(completions, **_):
    return [sum(c in "aeiou" for c in turns[0]["content"]) / 100 for turns in completions]
"""
BOTH = """
--model_name_or_path model --use_peft --lora_r 4 --lora_target_modules all-linear --use_cpu
--bf16 False --gradient_checkpointing False --learning_rate 1e-2 --max_steps 3 --save_steps 1
--eval_strategy steps --eval_steps 1 --logging_steps 1 --per_device_train_batch_size 8
--per_device_eval_batch_size 8 --dataset_test_split test --report_to none --disable_tqdm True
"""
GRPO = """
--dataset_name asked --reward_funcs mine_of_test.brief mine_of_test.vowels --num_generations 4
--reward_model_name_or_path judge --max_completion_length 8
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of such a script: model, reward model, data and reward functions."""
    model, tokenizer = models.load(config.load("pocket").model, say=lambda line: None)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_labels": 1, "vocab_size": len(tokenizer)}
    settings = LlamaConfig(**sizes, pad_token_id=tokenizer.pad_token_id)
    judge = LlamaForSequenceClassification(settings)
    for name, made in (("model", model), ("judge", judge)):
        made.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "mine_of_test.py").write_text(MINE)
    told = [{"role": "assistant", "content": "Ebola, measles."}]
    for name, more in (("asked", {}), ("told", {"completion": told})):
        (tmp_path / name).mkdir()
        for split, count in (("train", 16), ("test", 4)):
            turns = [[{"role": "user", "content": f"Name {n} viruses."}] for n in range(count)]
            lines = [json.dumps({"prompt": turn, **more}) + "\n" for turn in turns]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds to it
    return tmp_path


def run(script, words):
    found = script.make_parser().parse_args_and_config(words.split())
    script.main(*found)


@pytest.mark.parametrize("rule", ["penalty", "step"])
@pytest.mark.parametrize(("script", "words"), [(grpo, GRPO), (sft, "--dataset_name told")])
def test_trls_own_scripts_train_evaluate_and_resume(script, words, rule, place, monkeypatch):
    metric = {"metric": "step"} if rule == "step" else {}
    made = {"GRPOTrainer": capability_aware(trl.GRPOTrainer, **metric)}
    for name, trainer in (made | {"SFTTrainer": trl.SFTTrainer}).items():
        monkeypatch.setattr(trl, name, keeping(trainer, "self", rule, count=8))
    run(script, f"{BOTH} {words} --output_dir whole")
    run(script, f"{BOTH} {words} --output_dir cut --resume_from_checkpoint whole/checkpoint-2")
    one, other = (load_file(f"{out}/adapter_model.safetensors") for out in ("whole", "cut"))
    assert any(v.any() for k, v in one.items() if "lora_B" in k)
    assert all(torch.equal(one[k], other[k]) for k in one)
    state = json.loads((place / "whole" / "checkpoint-3" / "trainer_state.json").read_text())
    trained = [row for row in state["log_history"] if "loss" in row]
    assert len(trained) == 3 and trained[-1]["retention/kl"] > 0
    assert sum("eval_loss" in row for row in state["log_history"]) == 3
    if script is grpo:
        for reward in ("judge", "brief", "vowels"):
            assert all(f"weight/{reward}" in row for row in trained)
        moved = [trained[-1][f"weight/{name}"] for name in ("judge", "brief", "vowels")]
        assert len(set(moved)) == 3 and sum(moved) == pytest.approx(1)
