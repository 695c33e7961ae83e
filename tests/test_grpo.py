"""The order of prompts and the reward functions that TRL calls."""

import pytest
import torch

from bbkit import config, grpo, models, prompts, sft, weighting
from bbkit.data import instructions, questions
from bbkit.machine import functions

QUESTIONS = questions.ontology("validation")[:10]
GENERAL = instructions.examples("train", per_kind=1, kinds=instructions.SEEN)[:4]


def test_every_step_has_its_share_of_instructions():
    order = grpo.schedule(QUESTIONS, GENERAL, steps=6, groups=8, share=0.25, seed=0)
    steps = [order[i : i + 8] for i in range(0, len(order), 8)]
    assert len(steps) == 6
    assert all(sum(e.task == "instruction" for e in step) == 2 for step in steps)


def test_no_prompt_comes_again_before_all_have_come():
    order = grpo.schedule(QUESTIONS, [], steps=5, groups=2, share=0.5, seed=0)
    assert len({e.id for e in order}) == 10
    only = grpo.schedule([], GENERAL, steps=1, groups=4, share=0.0, seed=0)
    assert {e.id for e in only} == {e.id for e in GENERAL}


def test_the_order_follows_the_seed():
    first = grpo.schedule(QUESTIONS, GENERAL, 5, 4, 0.25, seed=1)
    assert first == grpo.schedule(QUESTIONS, GENERAL, 5, 4, 0.25, seed=1)
    assert first != grpo.schedule(QUESTIONS, GENERAL, 5, 4, 0.25, seed=2)


def test_reward_functions_score_their_own_row_and_leave_out_what_does_not_apply():
    rows = [QUESTIONS[0], GENERAL[0]]
    functions = grpo.reward_functions(rows)
    assert [f.__name__ for f in functions] == ["domain", "reasoning", "format"]
    replies = [
        [{"role": "assistant", "content": prompts.completion(e)}] for e in (rows[1], rows[0])
    ]
    got = [f(completions=replies, index=[1, 0], prompts=None) for f in functions]
    assert got == [[None, 1.0], [None, 1.0], [1.0, 1.0]]


OWN = """
def half(example, reply):
    return None if example.task == "instruction" else 0.5 + 0.5 * ("<answer>" in reply)
"""
OWN += "".join(
    f"def r{i}(example, reply):\n    return len(reply) % {i + 2} / {i + 2}\n" for i in range(7)
)


@pytest.mark.parametrize("rule", sorted(weighting.CONTROLLERS))
@pytest.mark.parametrize("count", [1, 4, 8])
def test_any_number_of_rewards_trains_and_is_logged_by_name(count, rule, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = [f"{tmp_path / 'own.py'}:{name}" for name in ("half", *(f"r{i}" for i in range(7)))]
    chosen = {1: own[:1], 4: ["domain", "reasoning", "format", own[0]], 8: own}[count]
    names = functions.names(chosen)
    settings = config.load("pocket", overrides=[
        "retention.rule=none", "grpo.steps=2", "grpo.prompts=2", "grpo.generations=4",
        "grpo.micro_batch_size=8", "grpo.max_completion_length=8", "grpo.advantages=capability",
        "grpo.combination=dual_cone", f"grpo.controller.rule={rule}", "grpo.weights.half=0.5",
        f"grpo.rewards=[{', '.join(chosen)}]",
    ])  # fmt: skip
    model, tokenizer = models.load(settings.model, say=lambda line: None)
    model = models.add_lora(model, settings.model, 0)
    order = [QUESTIONS[0], GENERAL[0]] * 2
    trainer = grpo.build(model, tokenizer, order, settings, tmp_path)
    trainer.train()
    weights = trainer.controller.weights
    assert len(weights) == count and sum(weights) == pytest.approx(1) and min(weights) > 0
    logged = set().union(*trainer.state.log_history)
    pairs = {f"cosine/{a}/{b}" for i, b in enumerate(names) for a in names[:i]}
    kinds = ("weight", "coefficient", "gradient_norm", "sigma")
    assert logged >= {f"{kind}/{name}" for kind in kinds for name in names} | pairs
    assert all(set(sample["rewards"]) == set(names) for sample in trainer.last_samples)
    if rule == "fixed":
        even = 1 / (count - 0.5)
        assert weights[names.index("half")] == pytest.approx(0.5 * even)


def test_less_padding_moves_no_gradient(tmp_path, monkeypatch):
    settings = config.load("pocket", overrides=[
        "retention.rule=none", "grpo.steps=1", "grpo.prompts=4", "grpo.generations=4",
        "grpo.micro_batch_size=4", "grpo.max_completion_length=16",
    ])  # fmt: skip
    cut, found, padded = grpo.by_length, [], []

    def seen(batches):
        kept = cut(batches)
        for some in (batches, kept):
            padded.append(sum(b["prompt_ids"].numel() + b["completion_ids"].numel() for b in some))
        return kept

    for by_length in (seen, list):
        monkeypatch.setattr(grpo, "by_length", by_length)
        model, tokenizer = models.load(settings.model, say=lambda line: None)
        model = models.add_lora(model, settings.model, 0)
        trainer = grpo.build(model, tokenizer, QUESTIONS[:2] + GENERAL[:2], settings, tmp_path)
        trainer.observed = {}
        trainer.train()
        assert trainer.gradient_engine == "one_pass"
        found.append(torch.cat(list(trainer.observed.values())))
    assert padded[1] < 0.9 * padded[0]
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()


def test_what_is_a_mean_over_a_micro_batch_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "by_length", None)  # would fail where called
    settings = config.load("pocket", overrides=[
        "retention.rule=none", "grpo.steps=1", "grpo.prompts=2", "grpo.generations=2",
        "grpo.micro_batch_size=2", "grpo.max_completion_length=4", "grpo.loss_type=bnpo",
    ])  # fmt: skip
    model, tokenizer = models.load(settings.model, say=lambda line: None)
    model = models.add_lora(model, settings.model, 0)
    grpo.build(model, tokenizer, QUESTIONS[:2], settings, tmp_path).train()


def test_columns_that_are_not_known_leave_the_rows_as_they_are():
    ones = torch.ones(2, 3, dtype=torch.long)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    batch = dict.fromkeys(names, ones) | {"ref_per_token_logps": ones}
    assert grpo.by_length([batch]) == [batch]


def test_sft_learns_the_reply_and_its_end_and_nothing_else(tmp_path):
    settings = config.load("pocket", overrides=["sft.steps=1", "retention.rule=none"])
    model, tokenizer = models.load(settings.model, say=lambda line: None)
    model = models.add_lora(model, settings.model, 0)
    trainer = sft.build(model, tokenizer, QUESTIONS, settings, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    told = {tokenizer.decode([t for t in row if t != -100]) for row in batch["labels"].tolist()}
    replies = [prompts.completion(e) + tokenizer.eos_token for e in QUESTIONS]
    gold = {tokenizer.decode(ids) for ids in tokenizer(replies).input_ids}
    assert told == gold


@pytest.mark.parametrize("preset", config.PRESETS)
def test_fields_that_unsloth_changes_are_set(preset, tmp_path):
    settings = config.load(preset)
    for section in (settings.sft, settings.grpo):
        given = sft.arguments(section, settings, tmp_path)
        assert {
            "optim", "learning_rate", "weight_decay", "warmup_steps", "seed", "lr_scheduler_type",
            "per_device_train_batch_size", "max_grad_norm", "report_to",
        } <= set(given)  # fmt: skip
