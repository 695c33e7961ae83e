"""Group sampling against transformers' own, bit for bit, and what passes through the model."""

from contextlib import nullcontext

import pytest
import torch
from conftest import moved
from datasets import Dataset
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer

from bbkit import config, data, grpo, models, prompts
from bbkit.capability import capability_aware
from bbkit.machine import sampling

EXAMPLES = data.load("ontology", "train")[:60:12]  # of several lengths


@pytest.fixture(scope="module")
def made():
    """The pocket model with LoRA weights of its own, and its tokenizer."""
    settings = config.load("pocket", None, ["model.lora_rank=4"]).model
    model, tokenizer = models.load(settings, say=lambda line: None)
    return moved(models.add_lora(model, settings, 0), 0.02), tokenizer


def batch(tokenizer, group):
    """Prompts as TRL pads them, each `group` times."""
    texts = [
        tokenizer.apply_chat_template(
            prompts.messages(e), add_generation_prompt=True, tokenize=False
        )
        for e in EXAMPLES
        for _ in range(group)
    ]
    return tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )


def draw(made, inputs, ours, seed=0, **options):
    """Completions, the state of the random numbers after them, and the rows of each forward."""
    model, tokenizer = made
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 24, **special, **options}
    rows: list[int] = []

    def watch(module, args, kwargs):
        rows.append(len(kwargs.get("input_ids", args[0] if args else ())))

    hook = model.get_base_model().register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with sampling.one_prefill_a_prompt(model) if ours else nullcontext():
            torch.manual_seed(seed)
            found = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                generation_config=GenerationConfig(**options, disable_compile=True),
                **({"tokenizer": tokenizer} if "stop_strings" in options else {}),
            )  # fmt: skip
    finally:
        hook.remove()
    assert "generate" not in vars(model)
    return found, torch.get_rng_state(), rows


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3, "min_p": 0.05},
    ],
)
def test_the_very_same_completions_from_one_prefill_a_prompt(made, group, options):
    inputs = batch(made[1], group)
    lengths = inputs["attention_mask"].sum(1)
    assert len(lengths.unique()) >= 3
    wanted, state, before = draw(made, inputs, ours=False, **options)
    found, after, rows = draw(made, inputs, ours=True, **options)
    assert torch.equal(found, wanted) and torch.equal(after, state)
    # The prompts once; then, a token later each time, the rows that have not ended.
    new = wanted[:, inputs["input_ids"].shape[1] :]
    ended = (new == made[1].eos_token_id).cumsum(1) > 0
    alive = (~ended).sum(0).tolist()
    assert before == [len(wanted)] * new.shape[1]
    assert rows == [len(EXAMPLES), *alive[: len(rows) - 1]]
    assert rows[-1] < len(wanted)


def test_prompts_that_differ_or_lie_apart(made):
    order = torch.randperm(20)
    inputs = {k: v[order] for k, v in batch(made[1], 4).items()}
    one = {k: v[::4] for k, v in batch(made[1], 4).items()}
    for given in (inputs, one):
        wanted, state, _ = draw(made, given, ours=False)
        found, after, rows = draw(made, given, ours=True)
        assert torch.equal(found, wanted) and torch.equal(after, state)
        assert rows[0] == len(EXAMPLES)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 2},
        {"stop_strings": ["e"]},
        {"prompt_lookup_num_tokens": 2},
        {"guidance_scale": 1.5},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 8},
    ],
)
def test_what_it_does_not_know_goes_the_plain_way(made, options):
    inputs = batch(made[1], 4)
    if "prompt_lookup_num_tokens" in options:  # takes one row
        inputs = {k: v[:1] for k, v in inputs.items()}
    options = {"max_new_tokens": 6, **options}
    wanted, state, before = draw(made, inputs, ours=False, **options)
    found, after, rows = draw(made, inputs, ours=True, **options)
    assert torch.equal(found, wanted) and torch.equal(after, state) and rows == before


def test_another_generate_is_left_alone(made, monkeypatch):
    model, calls = made[0], []
    monkeypatch.setattr(model.get_base_model(), "generate", lambda **given: calls.append(given))
    with sampling.one_prefill_a_prompt(model):
        model.generate(input_ids=torch.ones(1, 1))
    assert [set(given) for given in calls] == [{"input_ids"}]


def no_reward(completions, **_):
    return [0.0] * len(completions)


def test_a_trainer_samples_what_trl_samples(made, tmp_path):
    model, tokenizer = made
    rows = Dataset.from_list([{"prompt": prompts.messages(e)} for e in EXAMPLES])
    found = []
    for base in (GRPOTrainer, capability_aware(GRPOTrainer)):
        trainer = base(
            model=model, reward_funcs=[no_reward], train_dataset=rows, processing_class=tokenizer,
            args=GRPOConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4,
                use_cpu=True, bf16=False, report_to="none", max_completion_length=16, top_p=0.95,
            ),
        )  # fmt: skip
        ids = tokenizer.apply_chat_template(
            [prompts.messages(e) for e in EXAMPLES for _ in range(4)],
            add_generation_prompt=True, return_dict=True,
        )["input_ids"]  # fmt: skip
        seen: list[int] = []
        hook = model.get_base_model().register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(len(kwargs["input_ids"])),
            with_kwargs=True,
        )
        torch.manual_seed(3)
        found.append((trainer._generate_single_turn(ids, None, {}, 4), seen))
        hook.remove()
    (wanted, before), (ours, after) = found
    assert ours == wanted and len(wanted[0]) == 20
    assert before[0] == 20 and after[0] == len(EXAMPLES)


def test_parts_that_cut_a_group(made, tmp_path, monkeypatch):
    """The kit's trainer with `sample_at_once`, 6 completions of groups of 4."""
    overrides = ["grpo.prompts=3", "grpo.generations=4", "grpo.micro_batch_size=12"]
    overrides += ["grpo.sample_at_once=6", "grpo.max_completion_length=16", "retention.rule=none"]
    settings = config.load("pocket", None, overrides)
    trainer = grpo.build(*made, EXAMPLES[:3], settings, tmp_path)
    ids = [made[1](e.question)["input_ids"] for e in EXAMPLES[:3] for _ in range(4)]
    ours = trainer._generate_single_turn(ids, None, {}, 4)
    monkeypatch.setattr(sampling, "one_prefill_a_prompt", lambda model: nullcontext())
    assert ours == trainer._generate_single_turn(ids, None, {}, 4)
