"""Held-out evaluation: greedy replies, the three rewards, instruction following, intervals.

Serves every claim. Questions are clustered by disease (the bootstrap resamples diseases, not
questions); general instructions are independent prompts. What cannot be parsed counts as wrong and
is published beside the score. `domain_lenient` reads a reply that ignores the grammar, so that a
base model is judged by what it says and not by its tags.
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from bbkit import instructions, prompts, questions, rewards
from bbkit.extraction import extract_choice as extract_choice  # its documented place
from bbkit.ifeval import final_answer, score_ifeval
from bbkit.prompts import Example
from bbkit.statistics import interval

MEASURES = (
    "domain",
    "domain_lenient",
    "reasoning",
    "format",
    "instruction",
    "instruction_unseen",
    "unparsed",
    "ifeval_strict",
    "ifeval_loose",
    "ifeval_answer_strict",
)
PART = 32  # new tokens on a CPU, after which replies that have ended leave the batch


def generate(
    model,
    tokenizer,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_tokens: int,
    progress=None,
) -> list[str]:
    """Greedy replies in the order of `examples`; batches hold prompts of like length.

    A batch takes at most `batch_tokens` tokens of prompts and replies together, or one prompt.
    Returns decoded text without special tokens. The model's training mode is restored.
    """

    texts = [
        tokenizer.apply_chat_template(
            prompts.messages(e), add_generation_prompt=True, tokenize=False
        )
        for e in examples
    ]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    lengths = [len(tokens) for tokens in encoded]
    # The longest first: what does not fit in memory fails at once, not after an hour.
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    replies = [""] * len(texts)
    was_training = model.training
    model.eval()
    while order:
        most = max(1, batch_tokens // (lengths[order[0]] + max_new_tokens))
        chosen, order = order[:most], order[most:]
        batch = tokenizer(
            [texts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left",
            add_special_tokens=False,
        ).to(model.device)  # fmt: skip
        new = _greedy(model, tokenizer, batch, max_new_tokens)
        for i, text in zip(
            chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            replies[i] = text
        if progress:
            progress(len(chosen))
    model.train(was_training)
    return replies


def _greedy(model, tokenizer, batch, max_new_tokens: int) -> list[list[int]]:
    """New tokens of each row; on a CPU rows that have ended leave the batch after PART tokens.

    On a GPU a smaller batch saves little, and unsloth's generation takes no cache to go on from.
    """
    import torch

    ids, mask = batch["input_ids"], batch["attention_mask"]
    part = PART if ids.device.type == "cpu" else max_new_tokens
    cache, start = None, ids.shape[1]
    found: list[list[int]] = [[] for _ in ids]
    left = list(range(len(ids)))
    while left:
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache,
                max_new_tokens=min(part, start + max_new_tokens - ids.shape[1]),
                do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                return_dict_in_generate=True,
            )  # fmt: skip
        ids, cache = out.sequences, out.past_key_values
        for row, i in enumerate(left):
            found[i] = ids[row, start:].tolist()
        ended = (ids[:, start:] == tokenizer.eos_token_id).any(1)
        stay = (~ended).nonzero()[:, 0]
        if ids.shape[1] == start + max_new_tokens or not len(stay):
            return found
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
        ids, mask, left = ids[stay], mask[stay], [left[row] for row in stay.tolist()]
        cache.batch_select_indices(stay)
    return found


def divergence(
    model, tokenizer, examples: Sequence[Example], replies: Sequence[str]
) -> list[float]:
    """KL(π‖π_base) in nats per token along each reply to its prompt, exact over the vocabulary.

    Along greedy replies: the distance where the model goes, no estimate of the KL of sequences.
    `model` is a PEFT model; the base is the same model with its adapter off.
    """
    import torch

    pairs = zip(examples, replies, strict=True)
    rows = [prompts.encode(tokenizer, example, reply) for example, reply in pairs]
    found = [0.0] * len(rows)
    was_training = model.training
    model.eval()
    for chosen, ids, mask in prompts.batches([whole for whole, _ in rows], tokenizer, model):
        first = min(rows[i][1] for i in chosen) - 1  # what predicts the first token of a reply
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= {"logits_to_keep": ids.shape[1] - first}
        with torch.no_grad():
            ours = model(**inputs).logits.float().log_softmax(-1)
            with model.disable_adapter():
                bases = model(**inputs).logits.float().log_softmax(-1)
        tokens = (ours.exp() * (ours - bases)).sum(-1)
        for row, i in enumerate(chosen):
            whole, start = rows[i]
            found[i] = tokens[row, start - 1 - first : len(whole) - 1 - first].mean().item()
    model.train(was_training)
    return found


def lenient(example: Example, reply: str) -> float:
    """1 if the reply names the gold answer (or a synonym) and none of the other options.

    >>> e = Example("1", "choice", "Cause?", options=("a virus", "a worm"), answer="a virus")
    >>> lenient(e, "It comes from a virus."), lenient(e, "a virus or a worm")
    (1.0, 0.0)
    """

    def named(text: str) -> bool:
        return (
            re.search(rf"(?<!\w){re.escape(text.casefold())}(?!\w)", reply.casefold()) is not None
        )

    right = any(named(a) for a in (example.answer, *example.synonyms))
    return float(right and not any(named(o) for o in example.options if o != example.answer))


def measure(example: Example, reply: str) -> dict[str, float | None]:
    """All measures of one reply; None where a measure does not apply.

    >>> measure(Example("1", "short", "?", answer="virus"), "<answer>virus</answer>")["domain"]
    1.0
    """
    scores: dict[str, float | None] = dict(rewards.score(example, reply))
    if example.task != "instruction":
        scores["domain_lenient"] = lenient(example, reply)
        scores["unparsed"] = float(rewards.answer_given(example, reply) is None)
        return scores
    scores.pop("format")
    strict = float(all(instructions.check(c, reply) for c in example.constraints))
    unseen = any(c["kind"] in instructions.UNSEEN for c in example.constraints)
    scores["instruction_unseen" if unseen else "instruction"] = strict
    return scores


def cluster(item: Mapping) -> str:
    """What the bootstrap draws: a disease with its questions, an abstract, or a prompt by itself.

    MMLU's entity is its subject: six clusters would make no interval.
    """
    alone = item["task"] == "instruction" or item["source"] == "mmlu_medical"
    return item["id"] if alone else item["entity"]


def items(examples: Sequence[Example], replies: Sequence[str]) -> list[dict]:
    """One row per reply with all its measures."""
    return [_item(e, r, measure(e, r)) for e, r in zip(examples, replies, strict=True)]


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
        scores = {
            "ifeval_strict": float(all(whole["strict"])),
            "ifeval_loose": float(all(whole["loose"])),
            "ifeval_answer_strict": float(all(answer["strict"])),
        }
        out.append(_item(e, reply, scores))
    return out


def _item(e: Example, reply: str, scores: Mapping) -> dict:
    """One row per reply: what `summary` and `difference` count, and what a reader looks up."""
    return {
        "id": e.id, "task": e.task, "entity": e.entity, "source": e.source,
        "question": e.question, "gold": e.answer, "reply": reply, "scores": dict(scores),
    }  # fmt: skip


def summary(rows: Sequence[Mapping], draws: int = 2000) -> dict[str, dict]:
    """`{measure: {"value", "n", "interval"}}` over item rows; shares in [0, 1]."""
    out = {}
    for name in MEASURES:
        kept = [r for r in rows if r["scores"].get(name) is not None]
        if kept:
            out[name] = _mean([r["scores"][name] for r in kept], kept, draws)
    return out


def divergences(rows: Mapping[str, Sequence[Mapping]], draws: int = 2000) -> dict[str, dict]:
    """KL to the base where item rows hold it, as {"sft": …, "sft_instruction": …}: nats per token.

    >>> divergences({"base": []})
    {}
    """
    out = {}
    for stage, items_ in rows.items():
        known = [r for r in items_ if "kl" in r]
        for name in (stage, f"{stage}_instruction"):
            kept = [r for r in known if (r["task"] == "instruction") == (name != stage)]
            if kept:
                out[name] = _mean([r["kl"] for r in kept], kept, draws, shares=False)
    return out


def _mean(values: Sequence[float], rows: Sequence[Mapping], draws: int, shares=True) -> dict:
    low, high = interval(values, [cluster(r) for r in rows], draws, shares)
    return {"value": sum(values) / len(values), "n": len(values), "interval": [low, high]}


def difference(
    before: Sequence[Mapping], after: Sequence[Mapping], draws: int = 2000
) -> dict[str, dict]:
    """Paired change `after - before` on the same items, with a clustered bootstrap interval."""
    earlier = {(r["source"], r["id"]): r for r in before}
    out = {}
    for name in MEASURES:
        pairs = [
            (r["scores"][name] - earlier[r["source"], r["id"]]["scores"][name], cluster(r))
            for r in after
            if r["scores"].get(name) is not None and (r["source"], r["id"]) in earlier
        ]
        if pairs:
            values, clusters = [p[0] for p in pairs], [p[1] for p in pairs]
            low, high = interval(values, clusters, draws, shares=False)
            out[name] = {
                "value": sum(values) / len(values),
                "n": len(values),
                "interval": [low, high],
            }
    return out


def changes(rows: Mapping[str, Sequence[Mapping]], draws: int = 2000) -> dict[str, dict]:
    """`difference` between the stages that there are item rows of, as {"sft-base": ...}.

    >>> changes({"base": [], "sft": []})
    {'sft-base': {}}
    """
    pairs = (("base", "sft"), ("sft", "grpo"), ("base", "grpo"))
    known = [(a, b) for a, b in pairs if {a, b} <= set(rows)]
    return {f"{b}-{a}": difference(rows[a], rows[b], draws) for a, b in known}


def baselines(
    train: Sequence[Example], held_out: Sequence[Example], draws: int = 2000
) -> dict[str, dict]:
    """What no knowledge scores on the multiple-choice questions: name likeness, majority, chance.

    `majority` names the option that was gold most often among the training questions.
    """
    often = Counter(e.answer for e in train)
    asked = [e for e in held_out if e.options]
    if not asked:
        return {}
    rng = random.Random(0)
    guesses = {
        "guess_by_name": questions.guess_by_name,
        "majority": lambda e: max(e.options, key=lambda o: (often[o], o)),
        "chance": lambda e: rng.choice(e.options),
    }
    out = {}
    for name, guess in guesses.items():
        values = [float(guess(e) == e.answer) for e in asked]
        low, high = interval(values, [e.entity for e in asked], draws)
        out[name] = {"value": sum(values) / len(values), "n": len(values), "interval": [low, high]}
    return out


if __name__ == "__main__":
    import sys

    from bbkit import harness

    sys.exit(harness.main())
