"""The model-based part of the reasoning reward: what it scores, by whom, and how it is mixed in."""

import math

import pytest
import torch
from conftest import moved

from bbkit import config, grpo, models, prompts
from bbkit.data import instructions, questions
from bbkit.machine import judge

QUESTIONS = questions.ontology("validation")[::20][:6]  # of different diseases
GENERAL = instructions.examples("train", per_kind=1, kinds=instructions.SEEN)[0]


@pytest.fixture(scope="module")
def pocket():
    """The shipped model with an adapter that changes what it says."""
    settings = config.load("pocket")
    model, tokenizer = models.load(settings.model, say=lambda line: None)
    return moved(models.add_lora(model, settings.model, 0)), tokenizer


def gain(base, tokenizer, example, reply) -> float:
    """One sequence at a time, by the loss of transformers."""

    def mean(reasoning):
        start = tokenizer.apply_chat_template(
            prompts.messages(example), add_generation_prompt=True, tokenize=False
        )
        start += f"<reasoning>{reasoning}</reasoning><answer>"
        first, last = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in (start, example.answer)
        )
        labels = torch.tensor([[-100] * len(first) + last])
        with torch.no_grad():
            return -base(input_ids=torch.tensor([first + last]), labels=labels).loss.item()

    return mean(prompts.parse_reasoning(reply)) - mean("")


def test_it_is_the_gain_in_likelihood_under_the_base(pocket):
    model, tokenizer = pocket
    base, _ = models.load(config.load("pocket").model, say=lambda line: None)
    replies = [prompts.completion(e) for e in QUESTIONS]
    got = judge.judged(model, tokenizer, QUESTIONS, replies)
    for example, reply, value in zip(QUESTIONS, replies, got, strict=True):
        wanted = max(0.0, math.tanh(gain(base, tokenizer, example, reply) / 2))
        assert value == pytest.approx(wanted, abs=1e-5)


def test_only_logits_of_answers_are_made(pocket):
    model, tokenizer = pocket
    seen, head = [], model.get_base_model().lm_head
    hook = head.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    judge.judged(model, tokenizer, QUESTIONS[:1], [prompts.completion(QUESTIONS[0])])
    hook.remove()
    rows = [
        judge._tokens(tokenizer, QUESTIONS[0], x)
        for x in ("", prompts.parse_reasoning(prompts.completion(QUESTIONS[0])))
    ]
    longest, first = max(len(whole) for whole, _ in rows), min(start for _, start in rows)
    assert sum(seen) == longest - first + 1 < longest


def test_the_gold_chain_is_worth_more_than_that_of_another_question(pocket):
    model, tokenizer = pocket
    own = [prompts.completion(e) for e in QUESTIONS]
    others = [*own[1:], own[0]]
    gold, strange = (sum(judge.judged(model, tokenizer, QUESTIONS, r)) for r in (own, others))
    assert gold > strange + 1


def test_what_it_does_not_judge(pocket):
    model, tokenizer = pocket
    rows = [GENERAL, QUESTIONS[0], QUESTIONS[0]]
    replies = ["anything", "no tags", "<reasoning></reasoning><answer>x</answer>"]
    model.train()
    assert judge.judged(model, tokenizer, rows, replies) == [None, 0.0, 0.0]
    assert model.training


def test_its_share_is_mixed_into_the_reasoning_reward_alone():
    rows, text = [QUESTIONS[0], GENERAL], prompts.completion(QUESTIONS[0])
    replies = [[{"role": "assistant", "content": text}]] * 2

    def half(examples, replies):
        return [None if e.task == "instruction" else 0.5 for e in examples]

    functions = grpo.reward_functions(rows, half, share=0.4)
    got = [f(completions=replies, index=[0, 1]) for f in functions]
    plain = [f(completions=replies, index=[0, 1]) for f in grpo.reward_functions(rows)]
    assert got[0] == plain[0] == [1.0, None] and got[2] == plain[2]
    assert plain[1] == [1.0, None] and got[1] == [pytest.approx(0.8), None]
