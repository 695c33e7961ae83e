"""Loss and KL to the base on text that neither rewards nor retention look at, kind by kind.

Serves the claim of no alignment tax: instruction following at the base's level is not yet no tax.
The paper measures nothing of the sort. The worst kind is what counts. On texts of others a tuned
model may gain: there the KL tells more.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from bbkit import CannotRun, data, prompts
from bbkit.config import Settings
from bbkit.data import corpus
from bbkit.machine import generation
from bbkit.prompts import Example

# Kinds of text for models other than pocket: data card and split, none of which is trained on.
OPEN = {
    "answers": ("open_replies", "dolly"),
    "writing": ("general_instructions", "user_oriented"),
    "ifeval": ("open_replies", "ifeval"),
    "edits": ("general_instructions", "validation"),
}
WORST = ("elsewhere", "elsewhere_kl")


def texts(settings: Settings, data_dir: Path | None = None) -> list[Example]:
    """At most `evaluation.elsewhere` texts of each kind, the same at every call.

    `entity` is the kind, `question` (and `system`) the prompt, "" for none, `answer` the text.
    Kinds whose files are not in `data_dir`, or without one on the Hub, are left out, which is said.
    InputError: a file is there and not as its card says.

    >>> from bbkit import config
    >>> [e.entity for e in texts(config.load("pocket", overrides=["evaluation.elsewhere=1"]))]
    ['facts', 'chat', 'question', 'echo', 'instruction']
    """
    most = settings.evaluation.elsewhere
    if not most:
        return []
    if settings.model.name == "pocket":
        return [e for kind in corpus.FORMS for e in corpus.elsewhere(kind, most)]
    found, gone = [], []
    for kind, (card, split) in OPEN.items():
        rows: list[Example] = []
        if data.there(card, split, data_dir):
            with suppress(CannotRun):  # the Hub is out of reach
                rows = data.load(card, split, data_dir, allow_changed=settings.data.allow_changed)
        if not rows:
            gone.append(f"{kind} ({card})")
        # an edit has a text to edit, behind a blank line
        rows = [e for e in rows if e.answer and (kind != "edits" or "\n\n" in e.question)]
        for e in Random(0).sample(rows, min(most, len(rows))):
            found.append(Example(e.id, "instruction", e.question, answer=e.answer, entity=kind))
    if gone:
        hub = "to be had from the Hub: name a folder with --data-dir"
        place = f"in {data_dir}" if data_dir else hub
        print(f"elsewhere: not measured on {', '.join(gone)}: not {place}")
    return found


def measured(model, tokenizer, rows: Sequence[Example], max_length: int) -> list[dict[str, Any]]:
    """An item row for each text: its loss above the base's, and KL(base ‖ model), nats a token.

    Means over the tokens of the text and its end, cut to `max_length` with the prompt, which leaves
    some texts out; KL is exact over the vocabulary. `model` is a PEFT model, its adapter turned off
    for the base's part; for a model without adapter, the base itself, all is 0.
    """
    encoded = [_encode(tokenizer, e, max_length) for e in rows]
    kept = [i for i, (whole, asked) in enumerate(encoded) if asked < len(whole)]
    found = dict.fromkeys(kept, (0.0, 0.0))
    if hasattr(model, "disable_adapter"):
        known = [encoded[i] for i in kept]
        for place, ours, bases in generation.beside_base(model, tokenizer, known):
            whole, asked = known[place]
            said = ours.new_tensor(whole[asked:]).long()[:, None]
            above = (bases - ours).gather(1, said).mean().item()
            kl = (bases.exp() * (bases - ours)).sum(-1).mean().item()
            found[kept[place]] = above, max(0.0, kl)  # not below 0 by rounding
    return [
        {
            "id": e.id, "task": "elsewhere", "entity": e.entity, "source": f"elsewhere {e.entity}",
            "question": e.question, "gold": "", "reply": e.answer,
            "scores": scores(e.entity, *found[i]),
        }
        for i, e in enumerate(rows) if i in found
    ]  # fmt: skip


def _encode(tokenizer, e: Example, max_length: int) -> tuple[list[int], int]:
    """Tokens of prompt and text, and how many come before what is measured."""
    if e.question:
        whole, asked = prompts.encode(tokenizer, e, e.answer)
    else:  # nothing predicts the first token of a text without a prompt
        text = e.answer + tokenizer.eos_token
        whole, asked = tokenizer(text, add_special_tokens=False)["input_ids"], 1
    return whole[:max_length], asked


def scores(kind: str, above: float, kl: float) -> dict[str, float]:
    """The measures of one text by name.

    >>> scores("chat", 0.5, 0.25)
    {'elsewhere_chat': 0.5, 'elsewhere_kl_chat': 0.25}
    """
    return {f"{name}_{kind}": value for name, value in zip(WORST, (above, kl), strict=True)}


def names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The measures of each kind that item rows hold, in their order."""
    return list(
        dict.fromkeys(n for row in rows if row["task"] == "elsewhere" for n in row["scores"])
    )


def by_kind(known: Iterable[str]) -> dict[str, dict[str, str]]:
    """The measures of single kinds among names, by kind, for each measure in WORST.

    >>> by_kind(["domain", "elsewhere", "elsewhere_chat", "elsewhere_kl_chat"])
    {'elsewhere': {'chat': 'elsewhere_chat'}, 'elsewhere_kl': {'chat': 'elsewhere_kl_chat'}}
    """
    found: dict[str, dict[str, str]] = {name: {} for name in WORST}
    for name in known:
        if parts := re.fullmatch(r"(elsewhere(?:_kl)?)_(?!kl$)(\w+)", name):
            found[parts[1]][parts[2]] = name
    return found
