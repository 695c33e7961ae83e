"""The capability-aware trainer against TRL's own, on the pocket model with toy rewards."""

import json
import os
import runpy
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import moved
from datasets import Dataset
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from trl import GRPOConfig, GRPOTrainer

from bbkit import CannotRun, InputError, capability, combination, config, models, weighting
from bbkit.capability import capability_aware
from bbkit.machine import balance
from bbkit.runs import callback

PROMPTS = ["Name a virus.", "What causes measles?", "Repeat: fever", "Say yes or no."]


def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def brief(completions, **_):
    return [1 / (1 + len(text.split())) for text in completions]


def lettered(completions, prompts, **_):
    """Does not apply to the prompts that ask for a repetition."""
    return [
        None if p.startswith("Repeat") else float("e" in text)
        for p, text in zip(prompts, completions, strict=True)
    ]


REWARDS = (vowels, brief, lettered)


@pytest.fixture
def build(tmp_path):
    """A function that builds a small trainer on the pocket model with LoRA weights of its own."""
    settings = config.load("pocket", None, ["model.lora_rank=4"]).model

    def build(
        rewards=REWARDS, trainer=None, steps=2, folder="run", arguments=None, base=None, **options
    ):
        model, tokenizer = models.load(settings, say=lambda line: None)
        model = models.add_lora(model, settings, 0) if base is None else base(tokenizer)
        moved(model, 0.02)
        fields = {
            "output_dir": str(tmp_path / folder), "max_steps": steps, "learning_rate": 1e-3,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
            "steps_per_generation": 2, "num_generations": 4, "max_completion_length": 6,
            "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
            "logging_steps": 1, "disable_tqdm": True, "beta": 0.0, "loss_type": "dapo",
            "gradient_checkpointing": False, "reward_weights": [2.0, 1.0, 1.0][: len(rewards)],
        }  # fmt: skip
        return (trainer or capability_aware(GRPOTrainer, **options))(
            model=model,
            reward_funcs=list(rewards),
            args=GRPOConfig(**fields | (arguments or {})),
            train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS * 10]),
            processing_class=tokenizer,
        )

    return build


def against_trl(options):
    """A trainer that compares each step's gradient with that of TRL's own loss and advantages."""

    class Compared(capability_aware(GRPOTrainer, **options)):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen = getattr(self, "seen", [])
            again = any(one is inputs for one in seen)  # by replay, once one pass has missed some
            self.seen = seen if again else [*seen, inputs]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def _combine(self):
            kept, self._metrics = self._metrics, {"train": defaultdict(list)}
            self.model.zero_grad()
            for inputs in self.seen:
                GRPOTrainer.compute_loss(self, self.model, inputs).backward()
            wanted = self.flat()
            self._metrics, self.seen = kept, []
            super()._combine()
            self.pairs = [*getattr(self, "pairs", []), (self.flat(), wanted)]

        def flat(self):
            return torch.cat([p.grad.flatten() for p in self.capture.parameters.values()])

    return Compared


def cosine(pair):
    return nn.functional.cosine_similarity(*pair, dim=0).item()


PLAIN = {"controller": "fixed", "combination": "sum"}


@pytest.mark.parametrize(
    "advantages, aggregation, floor",
    [
        ("gdpo", "normalize_then_sum", 0.1),
        ("capability", "normalize_then_sum", 1e-4),
        ("grpo", "sum_then_normalize", 0.1),
        ("dr_grpo", "sum_then_normalize", 0.1),
    ],
)
def test_fixed_weights_and_sum_are_trls_own_update(build, advantages, aggregation, floor):
    """The exit criterion: 20 consecutive steps, each compared from equal states."""
    trainer = build(
        trainer=against_trl(PLAIN | {"advantages": advantages, "sigma_floor": floor}),
        steps=20 if advantages == "gdpo" else 4,
        arguments={
            "multi_objective_aggregation": aggregation,
            "scale_rewards": "none" if advantages == "dr_grpo" else "group",
            "reward_weights": [0.5, 0.25, 0.25],  # our weights sum to 1
        },
    )
    trainer.train()
    assert len(trainer.pairs) == trainer.args.max_steps
    assert trainer.gradient_engine == "one_pass"
    assert min(cosine(p) for p in trainer.pairs) >= 0.99999
    if advantages != "capability":  # that one is not whitened
        for ours, trls in trainer.pairs:
            assert torch.allclose(ours, trls, rtol=2e-3, atol=1e-3 * trls.abs().max().item())


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_other_losses_and_the_kl_penalty(build, loss_type):
    options = PLAIN | {"advantages": "grpo"}
    trainer = build(
        trainer=against_trl(options),
        arguments={"loss_type": loss_type, "beta": 0.5, "reward_weights": [0.5, 0.25, 0.25]},
    )
    trainer.train()
    assert min(cosine(p) for p in trainer.pairs) >= 0.99999
    assert "kl" in trainer.state.log_history[0]
    for row in trainer.state.log_history[:2]:
        assert len([k for k in row if k.startswith("coefficient/")]) == 3


def experts(tokenizer):
    """A random mixture of two experts, all of whose weights train."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    sizes |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return MixtralForCausalLM(MixtralConfig(**sizes, router_aux_loss_coef=0.5))


@pytest.mark.parametrize(
    "arguments, base, engine",
    [
        ({"entropy_coef": 0.5}, None, "one_pass"),
        ({"entropy_coef": 0.5, "beta": 0.3}, None, "one_pass"),
        ({}, experts, "replay"),  # packs the tokens of all sequences, expert by expert
    ],
)
def test_what_belongs_to_no_reward_is_kept_as_it_is(build, arguments, base, engine, monkeypatch):
    """Entropy bonus, KL penalty, a router's auxiliary loss: in a row of their own."""
    options = PLAIN | {"advantages": "grpo"}
    arguments = arguments | {"reward_weights": [0.5, 0.25, 0.25]}
    trainer = build(trainer=against_trl(options), arguments=arguments, base=base)
    rows = []
    combine = trainer._combine
    monkeypatch.setattr(
        trainer, "_combine", lambda: rows.append(trainer.capture.gradients[-1].norm()) or combine()
    )
    trainer.train()
    assert trainer.gradient_engine == engine
    assert min(cosine(p) for p in trainer.pairs) >= 0.99999
    assert len(rows) == 2 and all(row > 0 for row in rows) and len(trainer.capture) == 4


def test_an_entropy_bonus_that_adapts_is_counted_once_a_micro_batch(build):
    plain = {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.1}
    found = []
    for trainer in (GRPOTrainer, None):
        done = build(trainer=trainer, arguments=plain, steps=3, **PLAIN)
        done.train()
        found.append([row["entropy_coef"] for row in done.state.log_history[:3]])
    assert found[0] == found[1] and len({*found[0]}) == 3


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_replay_gives_the_same_gradients(build, beta):
    found = {}
    for engine in ("one_pass", "replay"):
        trainer = build(steps=1, arguments={"beta": beta}, advantages="gdpo", **PLAIN)
        trainer.gradient_engine = engine
        torch.manual_seed(0)
        trainer.train()
        found[engine] = trainer.state.log_history[0]
    for key, value in found["one_pass"].items():
        if key.startswith(("cosine/", "gradient_norm/", "coefficient/")) or key == "loss":
            other = found["replay"][key]
            assert other == value or other == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_bypassed_modules_turn_the_engine_to_replay(build, beta, capsys):
    """From the second micro-batch on, so that what the first has given must be made again."""
    rows = []
    for bypass in (False, True):
        trainer = build(steps=1, arguments={"beta": beta}, advantages="gdpo", **PLAIN)
        matrix = next(m for n, m in trainer.model.named_modules() if n.endswith("lora_A.default"))
        own_loss, calls = type(trainer).compute_loss, []

        def compute_loss(self, *args, matrix=matrix, own=own_loss, calls=calls, fuse=bypass, **kw):
            calls.append(self)
            if fuse and len(calls) == 2:
                matrix.forward = lambda x: x @ matrix.weight.T
            return own(self, *args, **kw)

        type(trainer).compute_loss = compute_loss
        trainer.train()
        rows.append(trainer.state.log_history[0])
    assert trainer.gradient_engine == "replay"
    assert "gradient engine replay: 1 matrices missed, first" in capsys.readouterr().out
    for key, value in rows[0].items():
        if key.startswith(("gradient_norm/", "cosine/")) or key == "grad_norm":
            assert rows[1][key] == value or rows[1][key] == pytest.approx(value, rel=1e-4), key


def test_unsloths_fused_kernels_give_way_to_one_pass(build, monkeypatch, capsys):
    def put_back(model, reason):
        matrix = next(m for n, m in model.named_modules() if n.endswith("lora_A.default"))
        return len([vars(matrix).pop("forward")])

    class Fused(capability_aware(GRPOTrainer, **PLAIN)):
        def __init__(self, model, **kwargs):
            matrix = next(m for n, m in model.named_modules() if n.endswith("lora_A.default"))
            matrix.forward = lambda x: x @ matrix.weight.T
            super().__init__(model=model, **kwargs)

    engines = []
    for names in ({}, {"_decline_fused_lora_for_fsdp": put_back}):
        llama = types.SimpleNamespace(**names)
        monkeypatch.setitem(sys.modules, "unsloth.models.llama", llama)
        trainer = build(trainer=Fused, steps=1)
        trainer.train()
        engines.append(trainer.gradient_engine)
    assert engines == ["replay", "one_pass"]
    assert "PEFT's forwards, not 1 fused kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_iterations": 3},
        {"num_iterations": 3, "engine": "replay"},
        {"gradient_accumulation_steps": 1, "steps_per_generation": 4},
        {"num_iterations": 3, "beta": 0.3},
        {"num_iterations": 3, "loss_type": "sapo"},
        {"num_iterations": 3, "loss_type": "vespo"},
        {"num_iterations": 3, "loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"num_iterations": 3, "loss_type": "cispo"},
    ],
)
def test_several_updates_of_one_generation_are_clipped_as_trls(build, arguments):
    """At a rate at which most of them are, of one sign of the advantage or of the other."""
    arguments = dict(arguments)
    engine = arguments.pop("engine", "one_pass")
    options = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    trainer = build(
        trainer=against_trl(PLAIN | {"advantages": "grpo"}), steps=6,
        arguments=options | {"reward_weights": [0.5, 0.25, 0.25]} | arguments,
    )  # fmt: skip
    trainer.gradient_engine = engine
    trainer.train()
    alive = [p for p in trainer.pairs if p[1].norm() > 0]
    assert len(alive) >= 3 and min(map(cosine, alive)) >= 0.9999
    clipped = [r["clip_ratio/region_mean"] for r in trainer.state.log_history if "loss" in r and
               "clip_ratio/region_mean" in r]  # fmt: skip
    assert arguments.get("loss_type") or max(clipped) > 0.05


def test_the_loss_that_is_logged_is_trls(build):
    plain = {"reward_weights": [0.5, 0.25, 0.25], "mask_truncated_completions": True}
    plain |= {"num_iterations": 2, "steps_per_generation": 2}
    found = []
    for trainer in (GRPOTrainer, None):
        done = build(trainer=trainer, steps=2, arguments=plain, advantages="grpo", **PLAIN)
        done.train()
        found.append([row for row in done.state.log_history if "loss" in row])
    for theirs, ours in zip(*found, strict=True):  # also where all of a part are masked
        names = [name for name in theirs if name == "loss" or name.startswith("clip_ratio")]
        assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], abs=1e-6)


def test_a_trainer_whose_loss_has_a_term_of_its_own_is_refused(build):
    class Imitates(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            logits = model(input_ids=inputs["completion_ids"]).logits
            return super()._compute_loss(model, inputs) + logits.float().logsumexp(-1).mean()

    with pytest.raises(InputError, match="at advantages of 0 the loss is"):
        build(trainer=capability_aware(Imitates, **PLAIN)).train()


def test_a_reward_of_weight_0_is_only_logged(build):
    trainer = build(steps=3, arguments={"reward_weights": [1.0, 0.0, 0.0]})
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert {row[f"coefficient/{f.__name__}"] for row in rows for f in (brief, lettered)} == {0.0}
    assert all(row["rewards/brief/mean"] > 0 for row in rows)


def test_rewards_out_of_range_are_said_once(build, capsys):
    def long(completions, **_):
        return [-len(text) for text in completions]

    build(rewards=(vowels, long), steps=2, controller="deficit").train()
    assert capsys.readouterr().out.count("deficit is made for [0, 1]") == 1


def test_what_trains_may_change_before_the_first_step(build):
    """As with a `model_init`, or where a norm is unfrozen once the trainer is there."""
    trainer = build(trainer=against_trl(PLAIN | {"advantages": "grpo"}),
                    arguments={"reward_weights": [0.5, 0.25, 0.25]})  # fmt: skip
    norm = next(p for n, p in trainer.model.named_parameters() if "norm" in n)
    norm.requires_grad_(True)
    trainer.train()
    assert any(p is norm for p in trainer.capture.parameters.values())
    assert min(cosine(p) for p in trainer.pairs) >= 0.9999


def test_a_step_that_was_broken_off_leaves_nothing_behind(build, monkeypatch):
    trainer = build(steps=2, arguments={"beta": 0.3}, **PLAIN)
    own, calls = GRPOTrainer._compute_loss, []

    def broken(self, model, inputs):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return own(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", broken)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.beta == 0.3 and trainer.micro_batches
    trainer.train()
    assert "kl" in trainer.state.log_history[0] and not trainer.micro_batches


def test_in_adams_metric_no_loss_rises_along_adams_direction(build):
    """Along D⁻¹d, D from the second moments before the step; momentum is not in it."""
    along = []

    class Seen(capability_aware(GRPOTrainer, controller="fixed", metric="adam")):
        def _combine(self):
            scale = combination.adam_scale(self.optimizer, self.capture.parameters.values())
            super()._combine()
            step = torch.cat([p.grad.flatten() for p in self.capture.parameters.values()])
            for row in self.observed.values() if scale is not None else ():
                if row.norm() > 0:
                    along.append(nn.functional.cosine_similarity(row, scale * step, dim=0).item())

    trainer = build(trainer=Seen, steps=8, arguments={"max_completion_length": 16})
    trainer.observed = {}
    trainer.train()
    assert len(along) >= 14 and min(along) >= -1e-5, along


def test_what_the_step_does_to_each_reward_is_measured_and_leaves_it_alone(build, monkeypatch):
    """The cone's sum opposes no reward; the step that momentum and Adam's metric make of it may."""
    asked = {"steps": 12, "combination": "dual_cone", "controller": "fixed"}
    trainer = build(**asked)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    slopes = [row[f"step/{f.__name__}/slope"] for row in rows for f in REWARDS]
    assert max(slopes) > 0 > min(slopes)  # a loss that rises with the step, to first order
    kept = [row[f"step/{f.__name__}/slope_kept"] for row in rows for f in REWARDS]
    assert kept == slopes and "step/cut" not in rows[-1]
    monkeypatch.setattr(combination.Limits, "watch", lambda *_: None)
    again = build(**asked)
    again.train()
    pairs = zip(trainer.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_order_is_drawn_for_each_seed_and_step_and_by_the_cpu_alone(build, monkeypatch):
    """torch.manual_seed begins every GPU's numbers anew: seeds would share their completions."""
    drawn, seeded = [], []

    class Watched(capability_aware(GRPOTrainer, combination="pcgrad")):
        def _combine(self):
            with monkeypatch.context() as patched:
                patched.setattr(torch, "manual_seed", seeded.append)
                super()._combine()

    def noted(gramian, method, weights, own=combination.combine):
        drawn.append(torch.default_generator.initial_seed())
        return own(gramian, method, weights)

    monkeypatch.setattr(capability, "combine", noted)
    for seed in (0, 1, 2):
        build(trainer=Watched, steps=3, arguments={"seed": seed}).train()
    assert len(set(drawn)) == 9 and not seeded


def test_rewards_that_say_nothing_leave_the_weights_alone(build):
    def nothing(completions, **_):
        return [None] * len(completions)

    def constant(completions, **_):
        return [0.7] * len(completions)

    trainer = build(rewards=(nothing, constant), steps=2, arguments={"max_grad_norm": 0.0})
    before = [p.clone() for p in trainer.capture.parameters.values()]
    trainer.train()
    after = trainer.capture.parameters.values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.state.log_history[0]["grad_norm"] == 0


def test_an_infinite_reward_is_named(build):
    def broken(completions, **_):
        return [float("inf")] * len(completions)

    with pytest.raises(InputError, match="reward 1 of completion 0 is infinite"):
        build(rewards=(vowels, broken)).train()


def test_a_trainer_without_a_joint_is_refused_with_the_version_that_has_it(build, monkeypatch):
    """Also where it is a method that we have of that name: ours would find no other to call."""

    class Renamed(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            del self.aux_loss_enabled

    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    with pytest.raises(CannotRun, match=r"Renamed of trl .* no _calculate_rewards, aux_loss_en"):
        build(trainer=capability_aware(Renamed))
    pins = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"trl=={capability.TRL}"' in pins


def test_rewards_of_another_shape_are_refused(build):
    class Summed(GRPOTrainer):
        def _calculate_rewards(self, *args):
            return super()._calculate_rewards(*args).sum(1, keepdim=True)

    with pytest.raises(CannotRun, match=r"rewards are \(8, 1\) in trl .*, not \(completions, 3\)"):
        build(trainer=capability_aware(Summed)).train()


def test_an_evaluation_may_draw_fewer_completions_a_prompt(build):
    """TRL's num_generations_eval: groups are training's alone, and the weights stay as they are."""
    few = {"num_generations_eval": 1, "per_device_eval_batch_size": 3}
    trainer = build(arguments=few, controller="deficit", rate=1.0)
    before = list(trainer.controller.weights)
    found = trainer.evaluate(Dataset.from_list([{"prompt": p} for p in PROMPTS[:3]]))
    assert 0 <= found["eval_rewards/vowels/mean"] <= 1 and "weight/vowels" not in found
    assert trainer.controller.weights == before
    trainer.train()


def test_a_step_broken_off_leaves_the_weights_as_they_were(build):
    """What bbkit.runs.callback brings back before it saves, when a signal comes within a step."""
    trainer = build(controller="deficit", rate=1.0)
    bring_back, before = callback._as_now(trainer), list(trainer.controller.weights)
    seen = weighting.statistics(torch.rand(8, 3), 4, before)
    assert trainer.controller.update(seen) != before
    bring_back()
    assert trainer.controller.weights == before


def test_unknown_names_are_refused():
    for what in ("advantages", "controller", "combination", "metric"):
        with pytest.raises(InputError, match=f"{what} 'adm': use one of "):
            capability_aware(GRPOTrainer, **{what: "adm"})


def test_rewards_of_one_name_are_numbered(build, capsys):
    def vowels_2(completions, **_):
        return [0.25] * len(completions)

    zeros = types.FunctionType(vowels.__code__, globals(), "vowels")
    trainer = build(rewards=(vowels, zeros, vowels_2), steps=1, controller="fixed")
    assert trainer.reward_func_names == ["vowels", "vowels_3", "vowels_2"]
    assert "reward 1 is logged as vowels_3: an earlier one" in capsys.readouterr().out
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["rewards/vowels_2/mean"] == 0.25 != row["rewards/vowels/mean"]
    weights = [row[f"weight/{name}"] for name in trainer.reward_func_names]
    assert weights == pytest.approx([0.5, 0.25, 0.25])


def test_a_negative_weight_is_refused_with_the_way_out(build):
    with pytest.raises(InputError, match="return the negative"):
        build(rewards=(vowels, brief), arguments={"reward_weights": [1.0, -0.5]})


@pytest.mark.parametrize("optimiser", ["sgd", "adafactor"])
def test_adams_metric_without_adams_moments_is_plain_and_says_so_once(build, optimiser, capsys):
    rows = []
    for metric in ("adam", "euclidean"):
        torch.manual_seed(0)
        options = {"arguments": {"optim": optimiser}, "controller": "fixed", "metric": metric}
        trainer = build(steps=3, **options)
        trainer.train()
        rows.append([r for r in trainer.state.log_history if "loss" in r])
        said = capsys.readouterr().out.count("keeps no float second moments of Adam; inner prod")
        assert said == (metric == "adam")
    for ours, plain in zip(*rows, strict=True):
        for key in (k for k in plain if k.startswith(("cosine/", "coefficient/"))):
            assert ours[key] == plain[key], key


def test_the_log_holds_every_key_of_the_contract(build):
    trainer = build(steps=2, metric="adam", controller="agreement")
    trainer.train()
    row = trainer.state.log_history[1]
    names = [f.__name__ for f in REWARDS]
    wanted = {
        f"{k}/{n}" for k in ("sigma", "weight", "coefficient", "gradient_norm") for n in names
    }
    wanted |= {"cosine/vowels/brief", "cosine/vowels/lettered", "cosine/brief/lettered"}
    assert wanted | {"seconds/combination", "loss", "entropy"} <= set(row)
    assert sum(row[f"weight/{n}"] for n in names) == pytest.approx(1)


@pytest.mark.parametrize("controller", ["deficit", "covariance", "agreement"])
def test_a_run_goes_on_from_its_checkpoint_to_the_same_weights(build, controller, tmp_path):
    options = {"controller": controller, "combination": "pcgrad", "rate": 0.5}
    saving = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    saving["restore_callback_states_from_checkpoint"] = controller == "deficit"
    whole = build(steps=4, arguments=saving, **options)
    whole.train()
    wanted = [p.clone() for p in whole.capture.parameters.values()]
    kept = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert "controller" in kept["stateful_callbacks"][balance.NAME]
    again = build(steps=4, arguments=saving, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    found = again.capture.parameters.values()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert again.controller.state() == whole.controller.state()


def test_a_run_goes_on_from_a_checkpoint_of_trls(build, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    build(trainer=GRPOTrainer, steps=1, arguments=saving).train()
    build(steps=2, arguments=saving).train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def test_the_lines_of_the_readme_run(tmp_path):
    """What README shows around one's own script, with that script's names filled in."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    lines = text.partition("<!-- python: wrap -->\n```python\n")[2].partition("```")[0]
    assert 0 < len(lines.strip().splitlines()) <= 10
    settings = config.load("pocket").model
    base, tokenizer = models.load(settings, say=lambda line: None)
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    names = {
        "model": models.add_lora(base, settings, 0), "correct": vowels, "polite": brief,
        "folder": str(tmp_path / "out"), "steps": 1,
        "rows": Dataset.from_list([{"prompt": p} for p in PROMPTS * 4]),
    }  # fmt: skip
    names["model"].config._name_or_path = str(tmp_path / "model")  # TRL reads the tokenizer there
    exec(lines, names)
    assert "weight/vowels" in names["trainer"].state.log_history[0]


WORKER = """
import sys
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from bbkit import config, gradients, models
from bbkit.capability import capability_aware
from bbkit.retention import keeping

out, ranks = sys.argv[1], int(sys.argv[2])
settings = config.load("pocket", None, ["model.lora_rank=4"]).model
model, tokenizer = models.load(settings, say=lambda line: None)
model = models.add_lora(model, settings, 0)
torch.manual_seed(0)
for name, p in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(p, std=0.02)

def generate(input_ids, **_):
    "Completions that follow from the prompt and the place in its group alone."
    rows = []
    for place, ids in enumerate(input_ids):
        draw = torch.Generator().manual_seed(int(ids.sum()) * 10 + place % 4)
        rows.append(torch.randint(300, 4000, (3 + place % 4,), generator=draw).tolist())
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    end = torch.tensor([r + [tokenizer.eos_token_id] + [pad] * (width - len(r)) for r in rows])
    return torch.cat([input_ids, end], dim=1)

model.generate = model.base_model.generate = model.base_model.model.generate = generate

def long(completions, **_):
    return [float(len(text)) / 50 for text in completions]

def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]

rows = [{"prompt": "Say " + "no " * n, "completion": "yes " * (4 - n)} for n in range(1, 4)]

class Kept(keeping(capability_aware(GRPOTrainer, combination="upgrad"), rows, weight=10.0)):
    def _keep(self, model):
        super()._keep(model)
        found = torch.cat([p.grad.flatten() for p in self.capture.parameters.values()])
        if self.accelerator.is_main_process:
            torch.save((found, self.accelerator.num_processes), out)

Kept(
    model=model, reward_funcs=[long, vowels], processing_class=tokenizer,
    train_dataset=Dataset.from_list([{"prompt": p} for p in ("Name a virus.", "Say no.")] * 4),
    args=GRPOConfig(
        output_dir=out + ".run", max_steps=1, per_device_train_batch_size=4, num_generations=4,
        gradient_accumulation_steps=2 // ranks, steps_per_generation=2 // ranks, use_cpu=True,
        bf16=False, report_to="none", save_strategy="no", max_completion_length=8, beta=0.1,
        shuffle_dataset=False, gradient_checkpointing=False,
        ddp_backend="gloo" if ranks > 1 else None,
    ),
).train()
"""


@pytest.mark.slow
def test_two_processes_give_the_update_of_one_with_the_joined_batch(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    words = [str(script), str(tmp_path / "2.pt"), "2"]
    done = subprocess.run(
        [sys.executable, *launch, *words], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "1.pt"), "1"])
    runpy.run_path(str(script))
    found = {}
    for ranks in (1, 2):
        found[ranks], count = torch.load(tmp_path / f"{ranks}.pt")
        assert count == ranks
    assert found[1].norm() > 0
    assert ((found[2] - found[1]).norm() / found[1].norm()).item() <= 1e-5
