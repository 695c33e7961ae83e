"""Measures, intervals and paired differences of the held-out evaluation."""

import random

import pytest
import torch
from conftest import moved

from bbkit import config, evaluate, models, prompts
from bbkit.data import instructions, questions
from bbkit.machine import generation
from bbkit.prompts import Example
from bbkit.runs import measures, statistics

ROWS = questions.ontology("validation")[:40] + instructions.examples("validation", per_kind=2)


def test_gold_replies_score_full_and_empty_ones_nothing():
    gold = evaluate.summary(evaluate.items(ROWS, [prompts.completion(e) for e in ROWS]), 100)
    for name in ("domain", "reasoning", "format", "instruction", "instruction_unseen"):
        assert gold[name]["value"] == 1.0, name
    assert gold["unparsed"]["value"] == 0.0
    empty = evaluate.summary(evaluate.items(ROWS, [""] * len(ROWS)), 100)
    assert empty["unparsed"]["value"] == 1.0
    assert all(v["value"] == 0.0 for k, v in empty.items() if k != "unparsed")


def test_seen_and_unseen_kinds_are_counted_apart():
    rows = [e for e in ROWS if e.task == "instruction"]
    replies = [e.answer if e.entity in instructions.SEEN else "no" for e in rows]
    found = evaluate.summary(evaluate.items(rows, replies), 100)
    assert found["instruction"]["value"] == 1.0 and found["instruction"]["n"] == 24
    assert found["instruction_unseen"]["value"] == 0.0 and found["instruction_unseen"]["n"] == 16


def test_a_lenient_reading_needs_the_gold_word_and_no_other_option():
    e = Example("1", "choice", "?", options=("fever", "rash", "cough"), answer="fever")
    told = {"It brings fever.": 1, "fever or rash": 0, "feverish": 0, "": 0, "FEVER!": 1}
    assert {reply: evaluate.lenient(e, reply) for reply in told} == told
    tagged = "<reasoning>It is {}.</reasoning><answer>{}</answer>"
    assert evaluate.lenient(e, tagged.format("fever", "cough")) == 0.0  # what it commits to
    assert evaluate.lenient(e, tagged.format("cough", "**fever**")) == 1.0
    assert evaluate.lenient(e, "The answer is A.") == evaluate.lenient(e, "(A)") == 1.0
    assert evaluate.lenient(e, "The answer is B, no fever.") == 0.0
    both = Example("1", "choice", "?", options=("left", "left and right"), answer="left and right")
    assert evaluate.lenient(both, "It is left and right.") == 1.0
    assert evaluate.lenient(both, "It is left.") == 0.0


def test_the_interval_widens_with_clusters_and_covers_the_truth():
    rng = random.Random(0)
    values, clusters = [], []
    for cluster in range(60):  # four equal answers per cluster: 60 facts, not 240
        value = float(rng.random() < 0.5)
        values += [value] * 4
        clusters += [str(cluster)] * 4
    low, high = statistics.interval(values, clusters, 2000)
    alone = statistics.interval(values, [str(i) for i in range(240)], 2000)
    assert low < 0.5 < high
    assert (high - low) > 1.7 * (alone[1] - alone[0])


def test_differences_are_paired_and_signed():
    before = evaluate.items(ROWS, [""] * len(ROWS))
    after = evaluate.items(ROWS, [prompts.completion(e) for e in ROWS])
    found = evaluate.difference(before, after, 100)
    assert found["domain"]["value"] == 1.0 and found["unparsed"]["value"] == -1.0
    same = evaluate.difference(after, after, 100)
    assert same["domain"] == {"value": 0.0, "n": 40, "interval": [0.0, 0.0]}
    shuffled = random.Random(1).sample(after, len(after))
    assert evaluate.difference(before, shuffled, 100)["domain"]["value"] == 1.0


def test_replies_are_those_of_a_prompt_alone_whenever_ended_ones_leave_the_batch(monkeypatch):
    model, tokenizer = models.load(config.load("pocket").model)
    alone = [generation.generate(model, tokenizer, [e], 12, 1)[0] for e in ROWS]
    lengths = {len(tokenizer(reply)["input_ids"]) for reply in alone}
    assert min(lengths) < 5 and max(lengths) == 12  # some end early, some never
    sizes, whole = [], model.generate
    model.generate = lambda **given: sizes.append(len(given["input_ids"])) or whole(**given)
    for part in (5, 32):
        monkeypatch.setattr(generation, "PART", part)
        assert generation.generate(model, tokenizer, ROWS, 12, 10**6) == alone
        assert sizes[0] == len(ROWS) and sizes == sorted(sizes, reverse=True)
        assert (sizes[-1] < len(ROWS)) == (part < 12)
        sizes.clear()


def test_divergence_is_zero_at_the_base_and_exact_beyond_it():
    torch.manual_seed(0)
    model, tokenizer = models.load(config.load("pocket").model)
    model = models.add_lora(model, config.load("pocket").model, 0).train()
    replies = [prompts.completion(e) for e in ROWS[:6]]
    assert max(map(abs, generation.divergence(model, tokenizer, ROWS[:6], replies))) < 1e-6
    moved(model)
    found = generation.divergence(model, tokenizer, ROWS[:6], replies)
    assert model.training and min(found) > 1e-3
    alone = generation.divergence(model, tokenizer, ROWS[3:4], replies[3:4])
    assert found[3] == pytest.approx(alone[0], rel=1e-4)  # whatever it is batched with
    prompt = tokenizer.apply_chat_template(
        prompts.messages(ROWS[3]), add_generation_prompt=True, tokenize=False
    )
    asked = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = tokenizer(prompt + replies[3] + tokenizer.eos_token, add_special_tokens=False)
    ids = torch.tensor([ids["input_ids"]])
    model.eval()
    with torch.no_grad():
        ours = model(ids).logits[0, asked - 1 : -1].log_softmax(-1)
        with model.disable_adapter():
            bases = model(ids).logits[0, asked - 1 : -1].log_softmax(-1)
    wanted = torch.nn.functional.kl_div(bases, ours, log_target=True, reduction="none").sum(1)
    assert alone[0] == pytest.approx(wanted.mean().item(), rel=1e-4)
    rows = evaluate.items(ROWS[:6], replies)
    for row, value in zip(rows, found, strict=True):
        row["kl"] = value
    told = measures.divergences({"base": evaluate.items(ROWS[:6], replies), "sft": rows}, 50)
    assert told["sft"]["value"] == pytest.approx(sum(found) / 6) and set(told) == {"sft"}


def test_baselines_know_nothing_and_say_so():
    train = questions.ontology("train")
    found = evaluate.baselines(train, [e for e in ROWS if e.task != "instruction"], 100)
    assert set(found) == {"guess_by_name", "majority", "chance"}
    assert all(v["value"] < 0.7 for v in found.values())
    assert evaluate.baselines(train, []) == {}


def test_ifeval_items_read_raw_text_and_final_answer_apart():
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    e = Example("1", "instruction", "No commas.", constraints=({"kind": "punctuation:no_comma"},))
    wrapped = "<reasoning>Well, yes.</reasoning><answer>Yes.</answer>"
    (row,) = evaluate.ifeval_items([e], [wrapped])
    assert row["scores"] == {"ifeval_strict": 0.0, "ifeval_loose": 0.0, "ifeval_answer_strict": 1.0}


def test_own_rewards_are_measures_with_intervals_and_changes():
    def brevity(example, reply):
        return None if not reply else 1 / (1 + len(reply))

    own = {"domain": evaluate.rewards.domain, "brevity": brevity}
    first = evaluate.items(ROWS, ["a"] * len(ROWS), own)
    then = evaluate.items(ROWS, ["", *["abc"] * (len(ROWS) - 1)], own)
    found = evaluate.summary(first, 50)["brevity"]
    assert found["value"] == 0.5 and found["n"] == len(ROWS) and len(found["interval"]) == 2
    changed = evaluate.difference(first, then, 50)["brevity"]  # where both have a value
    assert changed["value"] == pytest.approx(-0.25) and changed["n"] == len(ROWS) - 1
    assert "reasoning" in evaluate.summary(first, 50)  # the kit's own are always measured
