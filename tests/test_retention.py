"""The KL along the base's replies, the rules that keep it, and `keeping` around any trainer."""

import copy
import random
from pathlib import Path

import pytest
import torch
from conftest import moved
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from bbkit import InputError, config, models, retention, sft
from bbkit.capability import capability_aware
from bbkit.data import instructions, questions, replies
from bbkit.prompts import messages
from bbkit.retention import keeping

GENERAL = instructions.examples("train", per_kind=1, kinds=instructions.SEEN)[:8]
QUIET = {
    "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1, "save_strategy": "no",
    "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture
def pocket():
    settings = config.load("pocket", None, ["model.lora_rank=4"]).model
    model, tokenizer = models.load(settings, say=lambda line: None)
    return models.add_lora(model, settings, 0), tokenizer


@pytest.fixture(scope="module")
def known():
    """Replies of the base, by the base."""
    model, tokenizer = models.load(config.load("pocket").model, say=lambda line: None)
    return replies.answered(model, tokenizer, [messages(e) for e in GENERAL], 12)


def rows(known):
    return [(r.prompt_ids + r.reply_ids, len(r.prompt_ids)) for r in known]


def directly(model, known):
    """KL(base ‖ policy) a token, reply by reply, from logits of whole sequences."""
    total = count = 0
    for whole, asked in rows(known):
        ids = torch.tensor([whole])
        ours = model(input_ids=ids).logits[0, asked - 1 : -1].log_softmax(-1)
        with torch.no_grad(), model.disable_adapter():
            base = model(input_ids=ids).logits[0, asked - 1 : -1].log_softmax(-1)
        total = total + (base.exp() * (base - ours)).sum()
        count += len(base)
    return total / count


def test_the_loss_is_the_kl_of_the_reply_tokens_alone(pocket, known, monkeypatch):
    model, count = moved(pocket[0]), sum(len(r.reply_ids) for r in known)
    expected = directly(model, known).item()
    for most in (2**25, 4096 * 30, 1):  # one part, some, one for each reply
        monkeypatch.setattr(retention, "LOGITS", most)
        parts = list(retention.batches(rows(known), 4096))
        assert sum(len(ids) for ids, _, _ in parts) == len(known)
        assert (len(parts) == 1) == (most == 2**25) and (len(parts) == len(known)) == (most == 1)
        total = sum(retention.divergence(model, None, p) for p in parts)
        assert total.item() / count == pytest.approx(expected, rel=1e-4) and expected > 0.01


def test_only_logits_of_replies_are_made(pocket, known):
    seen, model = [], pocket[0]
    model.get_base_model().lm_head.register_forward_hook(
        lambda module, given, out: seen.append(out.shape[1])
    )
    (part,) = retention.batches(rows(known), 4096)
    retention.divergence(model, None, part)
    assert seen == [max(len(r.reply_ids) for r in known) + 1] * 2


def build(pocket, known, folder, trainer=SFTTrainer, steps=4, arguments=(), **rule):
    model, tokenizer = pocket
    given = dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, max_length=128,
        learning_rate=5e-3, gradient_accumulation_steps=2, completion_only_loss=True, **QUIET,
    ) | dict(arguments)  # fmt: skip
    return keeping(trainer, known, **rule)(
        model=model,
        args=SFTConfig(**given),
        train_dataset=Dataset.from_list(sft.rows(questions.ontology("validation")[:32])),
        processing_class=tokenizer,
    )


def test_a_penalty_adds_its_weight_times_the_gradient(pocket, known, tmp_path):
    model, seen = moved(pocket[0]), []

    class Seen(SFTTrainer):
        def training_step(self, *args, **kwargs):
            value = super().training_step(*args, **kwargs)
            seen.append([p.grad.clone() for p in self.model.parameters() if p.requires_grad])
            return value

    trainer = build(pocket, known, tmp_path, Seen, 1, weight=3.0, per_step=5)
    chosen = random.Random("replies/42/0").sample(known, 5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = directly(model, chosen)
    wanted = torch.autograd.grad(loss, parameters)
    taken = []
    trainer.create_optimizer_and_scheduler(1)
    trainer.optimizer.register_step_pre_hook(
        lambda *_: taken.append([p.grad.clone() for p in parameters])
    )
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    for before, after, want in zip(seen[-1], taken[0], wanted, strict=True):
        assert torch.allclose(after - before, 3.0 * want, atol=1e-5)
    told = trainer.state.log_history[0]
    assert told["retention/kl"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_penalty_keeps_the_base_where_plain_training_leaves_it(pocket, known, tmp_path):
    found = {}
    for weight in (0.0, 1.0):
        with torch.no_grad():
            for name, p in pocket[0].named_parameters():
                if ".lora_B." in name:
                    p.zero_()
        build(pocket, known, tmp_path, steps=12, weight=weight).train()
        found[weight] = directly(pocket[0], known).item()
    assert found[1.0] < 0.5 * found[0.0]


CLIPPED = {"max_grad_norm": 0.5, "weight_decay": 0.1, "learning_rate": 1e-2}


def test_a_step_rises_no_more_than_its_budget_lets_it(pocket, known, tmp_path):
    """Under AdamW with momentum, clipping and decay, and accumulation."""
    budget, recovery = 0.01, 0.3
    trainer = build(
        pocket, known, tmp_path, steps=12, arguments=CLIPPED, rule="step", budget=budget,
        recovery=recovery,
    )  # fmt: skip
    trainer.train()
    told = [row for row in trainer.state.log_history if "retention/kl" in row]
    assert len(told) == 12
    bounds = [recovery * (budget - row["retention/kl"]) for row in told]
    broken = 0
    for row, bound in zip(told, bounds, strict=True):
        room = 1e-4 * max(abs(bound), abs(row["retention/slope"]))
        assert row["retention/slope_kept"] <= bound + room
        broken += row["retention/slope"] > bound + room
        assert (row["retention/cut"] > 0) == (row["retention/slope"] > bound)
    assert broken >= 4


def test_a_cone_is_measured_on_the_step_but_holds_for_the_gradient_alone(pocket, known, tmp_path):
    model, steps = moved(pocket[0]), []
    trainer = build(
        pocket, known, tmp_path, rule="cone", per_step=8, arguments={"max_grad_norm": 0}
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    trainer.create_optimizer_and_scheduler(4)

    def cosine(*_):
        step = torch.cat([p.grad.flatten() for p in parameters])
        found = torch.autograd.grad(directly(model, known), parameters)
        kept = torch.cat([g.flatten() for g in found])
        steps.append(torch.nn.functional.cosine_similarity(step, kept, dim=0).item())

    trainer.optimizer.register_step_pre_hook(cosine)
    trainer.train()
    assert len(steps) == 4 and min(steps) > -1e-3
    row = trainer.state.log_history[0]
    assert row["retention/slope"] == row["retention/slope_kept"]
    assert 0 <= row["retention/cut"] < 1


def hook_forgotten(self, *_):
    self.rows = {}


def test_without_its_hook_a_step_breaks_the_budget(pocket, known, tmp_path, monkeypatch):
    """The check above can fail: the bound is broken where the hook does nothing."""
    monkeypatch.setattr("bbkit.combination.Limits._after", hook_forgotten)
    build(pocket, known, tmp_path, steps=12, arguments=CLIPPED, rule="step", budget=0.002).train()
    away = directly(pocket[0], known).item()
    monkeypatch.undo()
    with torch.no_grad():
        for name, p in pocket[0].named_parameters():
            if ".lora_B." in name:
                p.zero_()
    build(pocket, known, tmp_path, steps=12, arguments=CLIPPED, rule="step", budget=0.002).train()
    assert directly(pocket[0], known).item() < 0.5 * away


def test_replayed_replies_are_their_share_of_the_rows(pocket, known):
    examples = questions.ontology("validation")[:16]
    made = sft.mixed(pocket[1], examples, known[:3], 0.2, seed=0)
    assert len(made) == 20
    again = {tuple(r.prompt_ids + r.reply_ids): len(r.prompt_ids) for r in known[:3]}
    mixed_in = [row for row in made if tuple(row["input_ids"]) in again]
    assert len(mixed_in) == 4 and len({tuple(row["input_ids"]) for row in mixed_in}) == 3
    for row in mixed_in:
        asked = again[tuple(row["input_ids"])]
        assert row["completion_mask"] == [0] * asked + [1] * (len(row["input_ids"]) - asked)


def test_replayed_replies_are_of_all_kinds(pocket):
    examples = questions.ontology("validation")[:16]
    by_kind = [replies.Reply(k, "", "", [9, i], [8]) for i, k in enumerate("aaaaaaaabbbbbbbb")]
    made = sft.mixed(pocket[1], examples, by_kind, 1 / 3, seed=0)
    kinds = [by_kind[row["input_ids"][1]].kind for row in made[16:]]
    assert len(kinds) == 8 and min(map(kinds.count, "ab")) >= 2


def share(completions, **_):
    return [text.count("e") / (1 + len(text)) for text in completions]


def length(completions, **_):
    return [1 / (1 + len(text)) for text in completions]


PROMPTS = [{"prompt": p} for p in ("Name a virus.", "What causes measles?", "Say no.", "Go on.")]
PAIRS = [{**p, "chosen": " yes", "rejected": " no"} for p in PROMPTS]
TOLD = [{**p, "completion": " yes, of course"} for p in PROMPTS]


def trained(name, kept, pocket, folder, model=None, **rule):
    model, tokenizer = model or pocket[0], pocket[1]
    common = {**QUIET, "output_dir": str(folder), "max_steps": 2, "learning_rate": 1e-3}
    grpo = GRPOConfig(
        **common, per_device_train_batch_size=4, num_generations=4, max_completion_length=8
    )
    given: dict = {"model": model, "processing_class": tokenizer}
    if name == "sft":
        base, given["args"], data = SFTTrainer, SFTConfig(**common), TOLD
    elif name == "dpo":
        base, given["args"], data = DPOTrainer, DPOConfig(**common), PAIRS
    elif name == "trainer":
        base, given["args"] = Trainer, TrainingArguments(**common)
        ids = tokenizer("Measles is caused by a virus.").input_ids
        data = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}] * 4
    else:
        base = GRPOTrainer if name == "grpo" else capability_aware(GRPOTrainer)
        given |= {"args": grpo, "reward_funcs": [share, length]}
        data = PROMPTS
    trainer = keeping(base, kept, per_step=3, **rule)(
        train_dataset=Dataset.from_list(data), **given
    )
    trainer.train()
    return trainer


FORMS = {
    "rows": [{**p, "completion": " a virus"} for p in PROMPTS],
    "conversations": [
        {
            "prompt": [{"role": "user", "content": p["prompt"]}],
            "completion": [{"role": "assistant", "content": "a virus"}],
        }
        for p in PROMPTS
    ],
    "prompts": PROMPTS,
}


TRAINERS = ("sft", "dpo", "grpo", "capability", "trainer")
CASES = [(name, "penalty", form) for name in TRAINERS for form in ("rows", "prompts")]
CASES += [
    (name, rule, "conversations") for name in ("sft", "capability") for rule in ("step", "cone")
]


@pytest.mark.parametrize(("name", "rule", "form"), CASES)
def test_any_trainer_keeps(name, rule, form, pocket, tmp_path):
    moved(pocket[0])  # so that there is something to take back at once
    trainer = trained(name, FORMS[form], pocket, tmp_path, rule=rule)
    told = [row for row in trainer.state.log_history if "retention/kl" in row]
    assert len(told) == 2 and told[1]["retention/kl"] > 0
    assert ("retention/slope" in told[0]) == (rule != "penalty")
    if name == "capability":
        assert {"cosine/share/length", "weight/share"} <= set(told[0])
        assert "step/share/slope" in told[0]  # measured; what is bounded is retention's alone
        assert not any("step/cut" in row for row in told)


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "trainer"])
def test_any_trainer_keeps_what_its_base_says_by_itself(name, writer, tokenizer, tmp_path):
    """A tiny model that writes users' turns."""
    model = models.add_lora(copy.deepcopy(writer), config.load("pocket").model, 0)
    trainer = trained(name, "self", (moved(model), tokenizer), tmp_path, count=24)
    assert trainer.state.log_history[1]["retention/kl"] > 0
    assert 2 <= len(trainer._kept) <= 24


def test_the_lines_of_the_readme_run(writer, tokenizer, tmp_path):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    lines = text.partition("<!-- python: keep -->\n```python\n")[2].partition("```")[0]
    assert 0 < len(lines.strip().splitlines()) <= 10
    writer.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    names = {
        "model": str(tmp_path / "model"), "folder": str(tmp_path / "out"), "steps": 2,
        "rows": Dataset.from_list(TOLD), "lora": LoraConfig(target_modules="all-linear"),
    }  # fmt: skip
    exec(lines, names)
    assert len(names["trainer"]._noted["retention/kl"]) == 2


def test_a_step_metric_and_a_budget_are_kept_together(pocket, tmp_path):
    model, tokenizer = pocket
    aware = capability_aware(GRPOTrainer, controller="fixed", metric="step")
    trainer = keeping(aware, FORMS["rows"], rule="step", budget=1e-4, per_step=3)(
        model=model, processing_class=tokenizer, reward_funcs=[share, length],
        train_dataset=Dataset.from_list(PROMPTS),
        args=GRPOConfig(
            **QUIET, output_dir=str(tmp_path), max_steps=6, learning_rate=5e-3,
            per_device_train_batch_size=8, num_generations=8, max_completion_length=12,
            temperature=2.0,
        ),
    )  # fmt: skip
    trainer.train()
    told = [row for row in trainer.state.log_history if "retention/kl" in row]
    assert any(row["retention/cut"] > 0 for row in told)
    for row in told:
        for name in ("share", "length"):
            before, after = row[f"step/{name}/slope"], row[f"step/{name}/slope_kept"]
            assert after <= 1e-4 * abs(before) + 1e-7


def test_a_model_of_which_all_weights_train_needs_its_base(tmp_path, known):
    plain = config.load("pocket").model
    model, tokenizer = models.load(plain, say=lambda line: None)
    model.requires_grad_(True)
    with pytest.raises(InputError, match="base=a frozen copy"):
        trained("sft", FORMS["rows"], (model, tokenizer), tmp_path)
    base, _ = models.load(plain, say=lambda line: None)
    trainer = trained("sft", FORMS["rows"], (model, tokenizer), tmp_path, base=base)
    assert trainer.state.log_history[1]["retention/kl"] > 0


def test_dropout_does_not_part_a_model_from_its_base(known, tmp_path):
    levels = []
    for share in (0.0, 0.5):
        settings = config.load("pocket", None, [f"model.lora_dropout={share}"]).model
        model, tokenizer = models.load(settings, say=lambda line: None)
        model = moved(models.add_lora(model, settings, 0))
        trainer = trained("sft", known, (model, tokenizer), tmp_path)
        levels.append(trainer.state.log_history[0]["retention/kl"])
    assert levels[0] == pytest.approx(levels[1], rel=1e-5)
    drops = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert drops and all(m.training for m in drops)


@pytest.mark.parametrize(
    ("lora", "freed", "said"),
    [
        ({"init_lora_weights": "pissa"}, "", "changes the base's own weights"),
        ({"init_lora_weights": "olora"}, "", "changes the base's own weights"),
        ({}, "model.norm", "norm.weight trains and is no adapter's"),
        ({"modules_to_save": ["lm_head"]}, "", ""),
    ],
)
def test_a_base_that_cannot_be_switched_back_to_is_refused(lora, freed, said, known, tmp_path):
    settings = config.load("pocket", None, ["model.lora_rank=4"]).model
    model, tokenizer = models.load(settings, say=lambda line: None)
    asked = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **lora)
    model = get_peft_model(model, asked)
    for name, p in model.named_parameters():
        if freed and freed in name and "layers" not in name:
            p.requires_grad_(True)

    def build():
        fields = {"output_dir": str(tmp_path), "max_steps": 1, "learning_rate": 0.0} | QUIET
        return keeping(SFTTrainer, known)(
            model=model, args=SFTConfig(**fields), processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": "Say ox", "completion": "ox"}] * 8),
        )  # fmt: skip

    if said:
        with pytest.raises(InputError, match=said):
            build()
        return
    trainer = build()
    trainer.train()
    assert trainer.state.log_history[0]["retention/kl"] == pytest.approx(0, abs=1e-6)


def test_neftunes_noise_does_not_part_a_model_from_its_base(pocket, known, tmp_path):
    fields = {"output_dir": str(tmp_path), "max_steps": 1, "learning_rate": 0.0} | QUIET
    trainer = keeping(SFTTrainer, known)(
        model=pocket[0], processing_class=pocket[1],
        args=SFTConfig(**fields, neftune_noise_alpha=5),
        train_dataset=Dataset.from_list([{"prompt": "Say ox", "completion": "ox"}] * 8),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["retention/kl"] == pytest.approx(0, abs=1e-6)


def test_a_model_init_is_kept_too(known, tmp_path):
    """transformers makes another model when training begins."""
    settings = config.load("pocket", None, ["model.lora_rank=4"]).model
    tokenizer = models.load(settings, say=lambda line: None)[1]

    def made():
        model = models.add_lora(models.load(settings, say=lambda line: None)[0], settings, 0)
        return moved(model, 0.1)

    norms = []
    for weight in (1.0, 100.0):
        fields = {"output_dir": str(tmp_path), "max_steps": 1, "learning_rate": 0.0} | QUIET
        words = tokenizer(["Say ox"] * 8)
        rows_ = [{"input_ids": ids, "labels": ids} for ids in words["input_ids"]]
        trainer = keeping(Trainer, known, weight=weight)(
            model_init=made, args=TrainingArguments(**fields), processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows_),
        )  # fmt: skip
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] > 5 * norms[0]


def test_no_more_replies_are_made_than_asked_for(pocket, tmp_path):
    trainer = trained("sft", FORMS["prompts"], pocket, tmp_path, count=2)
    assert len(trainer._kept) == 2


def test_a_rule_of_the_settings_without_replies_is_refused(pocket, tmp_path):
    settings = config.load("pocket")
    with pytest.raises(InputError, match=r"sft: retention\.rule=penalty .* got none: pass them"):
        sft.build(*pocket, questions.ontology("validation")[:4], settings, tmp_path)


def test_a_rule_that_is_none_and_replies_that_are_none_are_refused(pocket, tmp_path):
    with pytest.raises(InputError, match="retention rule 'budget': use one of penalty, step"):
        keeping(SFTTrainer, rule="budget")
    with pytest.raises(InputError, match='give "self", prompts or rows'):
        trained("sft", "own", pocket, tmp_path)
    with pytest.raises(InputError, match="replies row 1: needs a prompt"):
        trained("sft", [{"text": "yes"}], pocket, tmp_path)
