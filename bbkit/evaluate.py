"""Held-out evaluation: greedy replies, the rewards, instruction following, intervals.

Serves every claim. Questions are clustered by disease (the bootstrap resamples diseases, not
questions); general instructions are independent prompts. What cannot be parsed counts as wrong and
is published beside the score. `domain_lenient` reads a reply without the grammar as well, so that a
base model is judged by what it says and not by its tags.
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from bbkit import prompts, rewards
from bbkit.benchmarks.extraction import extract_choice as extract_choice  # its documented place
from bbkit.benchmarks.ifeval import final_answer, score_ifeval
from bbkit.benchmarks.tasks.utils import read_choice
from bbkit.data import instructions, questions
from bbkit.machine.generation import generate as generate  # the notebooks' name for it
from bbkit.prompts import Example
from bbkit.runs import measures
from bbkit.runs.measures import difference as difference  # this and the next as generate
from bbkit.runs.measures import summary as summary


def lenient(example: Example, reply: str) -> float:
    """1 if the reply comes to the gold answer, in the kit's grammar or without it.

    What is read is the answer tag, the whole reply where it has none: the letter that it commits to
    as on a benchmark, else whether it names the gold or a synonym, and no other option.

    >>> e = Example("1", "choice", "Cause?", options=("a virus", "a worm"), answer="a virus")
    >>> lenient(e, "It comes from a virus."), lenient(e, "a virus or a worm"), lenient(e, "**A**")
    (1.0, 0.0, 1.0)
    >>> lenient(e, "<reasoning>It is a virus.</reasoning><answer>no worm</answer>")
    0.0
    """
    if rewards.domain(example, reply):
        return 1.0
    if example.options and (letter := read_choice(example, reply)):
        return float(prompts.letters(example)[letter] == example.answer)
    said = prompts.parse_answer(reply) or reply
    gold = {name.casefold() for name in (example.answer, *example.synonyms)}
    rest, named = said.casefold(), set()
    # The longest first, since one option may contain another.
    for name in sorted(gold | {o.casefold() for o in example.options}, key=len, reverse=True):
        rest, times = re.subn(rf"(?<!\w){re.escape(name)}(?!\w)", " ", rest)
        named |= {name} if times else set()
    return float(bool(named) and named <= gold)


def measure(
    example: Example, reply: str, own: Mapping[str, rewards.Reward] = rewards.REWARDS
) -> dict[str, float | None]:
    """All measures of one reply, `own` rewards among them; None where one does not apply.

    >>> measure(Example("1", "short", "?", answer="virus"), "<answer>virus</answer>")["domain"]
    1.0
    """
    scores: dict[str, float | None] = rewards.score(example, reply, {**rewards.REWARDS, **own})
    if example.task != "instruction":
        scores["domain_lenient"] = lenient(example, reply)
        scores["unparsed"] = float(rewards.answer_given(example, reply) is None)
        return scores
    scores.pop("format")
    strict = float(all(instructions.check(c, reply) for c in example.constraints))
    unseen = any(c["kind"] in instructions.UNSEEN for c in example.constraints)
    scores["instruction_unseen" if unseen else "instruction"] = strict
    return scores


def items(
    examples: Sequence[Example],
    replies: Sequence[str],
    own: Mapping[str, rewards.Reward] = rewards.REWARDS,
) -> list[dict]:
    """One row per reply with all its measures, `own` rewards among them."""
    return [_item(e, r, measure(e, r, own)) for e, r in zip(examples, replies, strict=True)]


def ifeval_items(examples: Sequence[Example], replies: Sequence[str]) -> list[dict]:
    """Item rows of IFEval prompts: a prompt counts when all of its instructions are kept.

    `ifeval_answer_strict` reads a reply in the kit's grammar by its answer: tags alone fail strict
    IFEval, which would look like tax.
    """
    rows = [
        {
            "key": e.id,
            "instruction_id_list": [c["kind"] for c in e.constraints],
            "kwargs": [{k: v for k, v in c.items() if k != "kind"} for c in e.constraints],
        }
        for e in examples
    ]
    raw = score_ifeval(rows, replies)
    final = score_ifeval(rows, [final_answer(r) for r in replies])
    out = []
    for e, reply, whole, answer in zip(examples, replies, raw, final, strict=True):
        verdicts = {"ifeval_strict": whole["strict"], "ifeval_loose": whole["loose"]}
        verdicts["ifeval_answer_strict"] = answer["strict"]
        out.append(_item(e, reply, {name: float(all(v)) for name, v in verdicts.items()}))
    return out


def _item(e: Example, reply: str, scores: Mapping) -> dict:
    return {
        "id": e.id, "task": e.task, "entity": e.entity, "source": e.source,
        "question": e.question, "gold": e.answer, "reply": reply, "scores": dict(scores),
    }  # fmt: skip


def baselines(
    train: Sequence[Example], held_out: Sequence[Example], draws: int = 2000
) -> dict[str, dict]:
    """What no knowledge scores on the multiple-choice questions: name likeness, majority, chance.

    `majority` names the option that was gold most often among the training questions.
    """
    often = Counter(e.answer for e in train)
    asked = [e for e in held_out if e.options]
    rng = random.Random(0)
    guesses = {
        "guess_by_name": questions.guess_by_name,
        "majority": lambda e: max(e.options, key=lambda o: (often[o], o)),
        "chance": lambda e: rng.choice(e.options),
    }
    out = {}
    for name, guess in guesses.items():
        pairs = [(float(guess(e) == e.answer), e.entity) for e in asked]
        if pairs:
            out[name] = measures.mean(pairs, draws, shares=True)
    return out


if __name__ == "__main__":
    import sys

    from bbkit.benchmarks import harness

    sys.exit(harness.main())
