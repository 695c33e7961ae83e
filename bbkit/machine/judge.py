"""The model-based part of the reasoning reward: the frozen base judges, by likelihoods.

Serves the claim that rewards by rules and by a model together beat rules alone. The paper names no
judge. Here a reasoning is worth as much as it raises the base's likelihood of the gold answer.
"""

import math
from collections.abc import Sequence

from bbkit import prompts
from bbkit.machine import generation
from bbkit.prompts import Example


def judged(
    model, tokenizer, examples: Sequence[Example], replies: Sequence[str]
) -> list[float | None]:
    """tanh(d / 2), at least 0, of each reply; None for instructions, 0 without a reasoning part.

    d is the gain in nats, mean over the tokens of the gold answer, of its log-likelihood under the
    base model: after the reply's reasoning, minus after an empty one. `model` is a PEFT model.
    """
    found: list[float | None] = [0.0] * len(replies)
    pairs = {}
    for i, (example, reply) in enumerate(zip(examples, replies, strict=True)):
        reasoning = prompts.parse_reasoning(reply)
        if example.task == "instruction":
            found[i] = None
        elif reasoning:
            pairs[i] = [_tokens(tokenizer, example, text) for text in ("", reasoning)]
    # A group's prompt, and often its reasoning, come more than once, and are read once.
    rows = list(dict.fromkeys(row for pair in pairs.values() for row in pair))
    values = dict(zip(rows, _likelihoods(model, tokenizer, rows), strict=True))
    for i, (before, after) in pairs.items():
        found[i] = max(0.0, math.tanh((values[after] - values[before]) / 2))
    return found


def _tokens(tokenizer, example: Example, reasoning: str) -> tuple[tuple[int, ...], int]:
    """Tokens of prompt, reasoning and gold answer, and where those of the answer begin."""
    turns = prompts.messages(example)
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    said = [f"{prompt}<reasoning>{reasoning}</reasoning><answer>", example.answer]
    before, answer = tokenizer(said, add_special_tokens=False)["input_ids"]
    return (*before, *answer), len(before)


def _likelihoods(model, tokenizer, rows: Sequence[tuple[Sequence[int], int]]) -> list[float]:
    """Mean log-likelihood, in nats a token, of what follows each row's start, under the base."""
    found = [0.0] * len(rows)
    for i, base in generation.beside_base(model, tokenizer, rows, base_only=True):
        whole, start = rows[i]
        answer = base.new_tensor(whole[start:]).long()[:, None]
        found[i] = base.gather(-1, answer).mean().item()
    return found
