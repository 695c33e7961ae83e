"""The base model's own replies to broad prompts: given, answered here, or asked by the base itself.

Serves the claim of no alignment tax: a step that keeps these replies keeps what the rewards do not
measure. Where there are no prompts the base writes them: self-dialogue (SA-SFT, arXiv 2602.20162),
there mixed into the data as rows, here text along which to compare with the base. Works on any
causal model of transformers, with or without an adapter of PEFT, which is off.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from bbkit import InputError
from bbkit.data import layouts
from bbkit.machine import files, generation
from bbkit.machine.hub import one_line
from bbkit.prompts import closing

Prompt = str | list[dict[str, Any]]
MARK = "8301749265"  # a user turn that no template strips, cuts or puts into other case


class Reply(NamedTuple):
    """A prompt and its reply; token ids are those that a model meets."""

    kind: str  # of prompt, "" if not known
    prompt: str  # as the model reads it: the chat template applied, or plain text
    text: str  # the reply, without its end token
    prompt_ids: list[int]
    reply_ids: list[int]  # with the end token where the reply ended


class Rows(NamedTuple):
    """What rows hold: `replies`, or none of these where the rows are prompts alone."""

    prompts: list[Prompt]
    kinds: list[str]
    replies: list[Reply]


def answered(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_tokens: int = 12_000,
    kinds: Sequence[str] = (),
) -> list[Reply]:
    """Greedy replies of the base to N prompts, in order; a batch holds at most `batch_tokens`.

    Messages go through the chat template, texts are taken as they are. Nothing of the model
    changes. Raises InputError for a prompt that is empty or that the template refuses.

    >>> from bbkit import config, models
    >>> base, tokenizer = models.load(config.load("pocket").model, say=lambda line: None)
    >>> [reply] = answered(base, tokenizer, [[{"role": "user", "content": "Write: ox"}]], 3)
    >>> reply.prompt, len(reply.reply_ids)
    ('<|user|>Write: ox<|end|><|assistant|>', 3)
    """
    asked = [_shown(tokenizer, _checked(prompt, n), n) for n, prompt in enumerate(prompts, 1)]
    ends, rows = _ends(tokenizer, model), [ids for _, ids, _ in asked]
    pad = next(t for t in (tokenizer.pad_token_id, *ends, 0) if t is not None)
    with _base(model):
        found = generation.greedy(model, rows, max_new_tokens, batch_tokens, ends, pad)
    return [
        Reply(kind, shown, _text(tokenizer, new, ends), ids, new)
        for kind, (shown, ids, _), new in zip(kinds or [""] * len(rows), asked, found, strict=True)
    ]


def from_rows(
    tokenizer, rows: Iterable[Mapping[str, Any] | Prompt], count: int | None = None, seed: int = 0
) -> Rows:
    """Rows in TRL's forms: prompt and completion, both texts or both messages, or prompts alone.

    A row may have a `kind`; with `count`, that many are taken, see `spread`. Prompts alone may be
    bare. Raises InputError with the number of a row of another form, or of another than the first.

    >>> from_rows(None, [{"prompt": "Name a bone.", "kind": "list"}, "Is it so?"]).kinds
    ['list', '']
    """
    given = [_checked(row, number) for number, row in enumerate(rows, 1)]
    whole = ["completion" in row for row in given]
    if len(set(whole)) == 2:
        odd = whole.index(not whole[0])
        has = f"{'a' if whole[odd] else 'no'} completion, unlike row 1"
        raise InputError(f"replies row {odd + 1}: it has {has}; give all rows one, or none")
    kinds = [str(row.get("kind", "")) for row in given]
    places = range(len(given)) if count is None else spread(kinds, count, seed)
    found = Rows([given[i]["prompt"] for i in places], [kinds[i] for i in places], [])
    if any(whole):
        ends = _ends(tokenizer)
        for i in places:
            shown, ids, rest = _shown(tokenizer, given[i], i + 1)
            new = tokenizer(rest, add_special_tokens=False)["input_ids"]
            last = max((n for n, token in enumerate(new, 1) if token in ends), default=len(new))
            new = new[:last]  # without what a template puts between turns
            found.replies.append(Reply(kinds[i], shown, _text(tokenizer, new, ends), ids, new))
    return found


def spread(kinds: Sequence[str], count: int, seed: int) -> list[int]:
    """Places of `count` rows, in order, equally many of each kind while there are any of it.

    >>> [["ab"[i > 1] for i in spread("aabbbbbb", n, seed=0)] for n in (4, 6)]
    [['a', 'a', 'b', 'b'], ['a', 'a', 'b', 'b', 'b', 'b']]
    """
    draw = random.Random(seed)
    places = [[i for i, k in enumerate(kinds) if k == kind] for kind in sorted(set(kinds))]
    turns = zip_longest(*(draw.sample(own, len(own)) for own in places))
    return sorted(islice((i for i in chain.from_iterable(turns) if i is not None), count))


def refuse_held_out(prompts: Sequence[Prompt], held_out: Iterable[str]) -> None:
    """Raises InputError where a prompt, or a user's turn in it, is one of the texts `held_out`.

    >>> refuse_held_out(["Name a bone."], ["name a  BONE"])
    Traceback (most recent call last):
        ...
    bbkit.InputError: replies prompt 1: of a test split ('Name a bone.'); leave it out
    """
    tests = {layouts.normal(text) for text in held_out}
    for number, prompt in enumerate(prompts, 1):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for said in (str(turn["content"]) for turn in turns if turn["role"] == "user"):
            if layouts.normal(said) in tests:
                told = f"of a test split ({said[:60]!r}); leave it out"
                raise InputError(f"replies prompt {number}: {told}")


def own_turns(
    model,
    tokenizer,
    count: int,
    seed: int,
    max_new_tokens: int = 96,
    batch: int = 64,
    say=print,
    held_out: Iterable[str] = (),
) -> list[list[dict[str, Any]]]:
    """User turns that the base writes behind its template's opening: one list of messages each.

    `count` are sampled at temperature 1; those that do not end, repeat one, are empty or stand in
    `held_out` are dropped, and `say` gets the numbers. Follows from seed and batch; the global
    random state stays. Raises InputError where no turn opens, or hardly one is written.

    >>> from bbkit import config, models
    >>> pocket = models.load(config.load("pocket").model, say=lambda line: None)
    >>> own_turns(*pocket, 4, seed=0)  # taught replies alone; doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    bbkit.InputError: replies: the base wrote 0 of 4 user turns; ...
    """
    import torch

    opening, end = _opening(tokenizer)
    ends, tests = {*_ends(tokenizer, model), end}, {layouts.normal(text) for text in held_out}
    cuda = [model.device] if model.device.type == "cuda" else []
    said: list[list[int]] = []
    with _base(model), generation.undisturbed(model), torch.random.fork_rng(cuda), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for device in cuda:  # torch.manual_seed would seed the other GPUs too
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        while len(said) < count:
            ids = torch.tensor([opening] * min(batch, count - len(said)), device=model.device)
            new = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                pad_token_id=end, eos_token_id=sorted(ends),
            )  # fmt: skip
            said += [generation.cut(row, ends) for row in new[:, len(opening) :].tolist()]
    turns: dict[str, str] = {}
    lost: Counter[str] = Counter()
    for tokens in said:
        text = _text(tokenizer, tokens, [end]).strip()
        key = layouts.normal(text)
        wrong = {"did not end": tokens[-1:] != [end], "were empty": not key}
        wrong |= {"stand in a test split": key in tests, "repeated": key in turns}
        if any(wrong.values()):
            lost[next(why for why, so in wrong.items() if so)] += 1
        else:
            turns[key] = text
    told = ", ".join(f"{n} {why}" for why, n in lost.most_common())
    line = f"replies: the base wrote {len(turns)} of {count} user turns" + f"; {told}" * bool(told)
    if len(turns) < max(2, count // 20):
        raise InputError(f"{line}; it was not taught to write them, so give prompts of your own")
    say(line)
    return [[{"role": "user", "content": text}] for text in turns.values()]


def write(path: Path, replies: Sequence[Reply]) -> None:
    """Replies as JSON lines, whole or not at all; InputError or CannotRun where that fails."""
    files.write_rows(path, (reply._asdict() for reply in replies))


def read(path: Path) -> list[Reply]:
    """The replies that `write` wrote, [] without a file; InputError where it is damaged."""
    try:
        return [Reply(**row) for row in files.read_rows(path)]
    except TypeError as error:
        raise InputError(f"{path}: not a file of replies; remove it for a new one") from error


def _checked(row: Any, number: int) -> dict[str, Any]:
    """What of a row is used here, its completion only where it has one."""
    row = {"prompt": row} if isinstance(row, str | list) else row
    given = row if isinstance(row, Mapping) else {"row": row}
    prompt, reply = given.get("prompt"), given.get("completion")
    texts = isinstance(prompt, str) and isinstance(reply, str | None)
    chat = _messages(prompt) and (reply is None or _messages(reply) == ["assistant"])
    if not prompt or not (texts or chat):
        has = (f"{key!r} ({'empty ' * (not v)}{type(v).__name__})" for key, v in given.items())
        raise InputError(
            f"replies row {number}: needs a prompt, with or without a completion, as in TRL: "
            f"texts, or messages and one of the assistant; it has {', '.join(has)}"
        )
    used = ("prompt", "completion", "kind", "chat_template_kwargs")
    return {key: given[key] for key in used if given.get(key) is not None}


def _messages(value: Any) -> list[str] | None:
    """The roles of messages; None of anything else."""
    fit = isinstance(value, list) and all(
        isinstance(turn, Mapping) and turn.keys() >= {"role", "content"} for turn in value
    )
    return [turn["role"] for turn in value] if fit else None


def _shown(tokenizer, row: dict[str, Any], number: int) -> tuple[str, list[int], str]:
    """The prompt as the model reads it, its tokens, and the text of the completion with its end."""
    prompt, rest = row["prompt"], row.get("completion", "")
    if isinstance(prompt, str):
        if tokenizer.eos_token and not rest.endswith(tokenizer.eos_token):
            rest += tokenizer.eos_token  # as TRL does
    else:
        from trl import apply_chat_template

        try:
            shown = apply_chat_template({k: v for k, v in row.items() if k != "kind"}, tokenizer)
        except Exception as error:  # templates raise what they like
            why = f"no chat text of it ({one_line(error)})"
            raise InputError(f"replies row {number}: {why}") from error
        prompt, rest = shown["prompt"], shown.get("completion", "")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    begin = tokenizer("")["input_ids"][:1]  # templates write it themselves, and texts may
    if isinstance(row["prompt"], str) and begin == [tokenizer.bos_token_id] != ids[:1]:
        ids = begin + ids
    return prompt, ids, rest


def _text(tokenizer, tokens: list[int], ends: Iterable[int]) -> str:
    said = tokens[:-1] if tokens and tokens[-1] in ends else tokens
    return tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _ends(tokenizer, model=None) -> list[int]:
    """What may end a reply: the tokenizer's eos, the template's closing token, the model's own."""
    found = {tokenizer.eos_token_id, closing(tokenizer) if tokenizer.chat_template else None}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found |= set(own) if isinstance(own, list) else {own}  # Llama 3 has several
    return sorted(found - {None})


def _base(model):
    """The model without its adapter, if it has one."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def _opening(tokenizer) -> tuple[list[int], int]:
    """Tokens that the chat template puts before what a user says, and the first one after it."""
    turns, shown, why = [{"role": "user", "content": MARK}], "", "none in what it writes"
    try:
        shown = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise what they like
        why = one_line(error) if tokenizer.chat_template else "there is no template"
    before, _, after = shown.partition(MARK)
    # A space belongs to the word behind it, for a tokenizer: "[INST] Name" is "[INST]", " Name".
    opening = tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"]
    end = tokenizer(after.lstrip(" "), add_special_tokens=False)["input_ids"][:1]
    if not opening or not end or MARK in after:
        raise InputError(
            f"replies: the chat template shows no place where a user's turn begins ({why}); "
            "give prompts of your own, or take an instruction model"
        )
    return opening, end[0]
