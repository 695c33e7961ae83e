"""The one prompt grammar: what a model is shown, what it should reply, how a reply is read.

Serves every claim (each score is read through it); the paper prints no prompt, so this one is ours.
The anchored rule: a reply's tags, in order, are the reasoning pair, the answer pair, or the one and
then the other. Repeated, nested, unclosed or swapped tags read as None, so an answer inside the
reasoning is none. Text outside is ignored here and costs format. Linear time: find and rfind only.
"""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_uppercase

SYSTEM = "Reason in <reasoning></reasoning>, then give the answer in <answer></answer>."
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
LOGITS = 2**25  # numbers in the logits of one pass at most: 128 MB for each copy of them


@dataclass(frozen=True)
class Example:
    """One row of any data set; `task` is "choice", "short" or "instruction".

    `system` is the system turn of an instruction, "" for none; questions have the grammar's.
    """

    id: str
    task: str
    question: str
    context: str = ""
    options: tuple[str, ...] = ()
    answer: str = ""
    synonyms: tuple[str, ...] = ()
    reasoning: str = ""
    steps: tuple[tuple[str, str, str], ...] = ()
    entity: str = ""
    constraints: tuple[Mapping, ...] = ()
    source: str = ""
    split: str = ""
    system: str = ""


def letters(example: Example) -> dict[str, str]:
    """Letter to option text, in the order shown.

    >>> letters(Example("1", "choice", "Cause?", options=("virus", "worm")))
    {'A': 'virus', 'B': 'worm'}
    """
    return dict(zip(ascii_uppercase, example.options, strict=False))


def messages(example: Example) -> list[dict[str, str]]:
    """The chat turns before the reply: system and user; an instruction may have no system turn.

    >>> messages(Example("1", "choice", "Cause?", options=("virus", "worm")))[1]["content"]
    'Cause?\\nA) virus\\nB) worm'
    """
    context = f"{' '.join(example.context.splitlines())}\n\n" if example.context else ""
    options = "".join(f"\n{letter}) {text}" for letter, text in letters(example).items())
    system = example.system if example.task == "instruction" else SYSTEM
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": f"{context}{example.question}{options}"}]


def completion(example: Example) -> str:
    """The gold reply. Where two options share a text or are letters, the answer is "B) text".

    >>> completion(Example("1", "short", "Cause?", answer="virus", reasoning="It is a virus."))
    '<reasoning>It is a virus.</reasoning><answer>virus</answer>'
    """
    if example.task == "instruction":
        return example.answer
    answer, options = example.answer, letters(example)
    if _pick(answer, options) is None:
        answer = next((f"{key}) {text}" for key, text in options.items() if text == answer), answer)
    return f"<reasoning>{example.reasoning}</reasoning><answer>{answer}</answer>"


def encode(tokenizer, example: Example, reply: str) -> tuple[list[int], int]:
    """Tokens of prompt, reply and end, and how many are the prompt's.

    In two parts, as a model meets them: together, a newline that opens the reply could join the
    prompt's last token.
    """
    turns, end = messages(example), tokenizer.eos_token
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    asked, said = tokenizer([prompt, reply + end], add_special_tokens=False)["input_ids"]
    return asked + said, len(asked)


def closing(tokenizer) -> int | None:
    """The special token with which the chat template closes a reply; None where it has no such."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "REPLY"}]
    tail = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("REPLY")[2]
    first = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
    return first[0] if first and first[0] in tokenizer.added_tokens_decoder else None


@lru_cache(maxsize=8)  # each reward reads the same reply
def split_reply(text: str) -> tuple[str | None, str | None, str] | None:
    """Reasoning, answer (None where absent) and the text outside; None where the rule fails.

    >>> split_reply("<reasoning> so </reasoning> <answer>B</answer> Bye.")
    ('so', 'B', 'Bye.')
    """
    at = [text.find(tag) for tag in TAGS]
    found = [i for i in sorted(range(4), key=at.__getitem__) if at[i] >= 0]
    if found not in ([0, 1, 2, 3], [0, 1], [2, 3]) or at != [text.rfind(tag) for tag in TAGS]:
        return None
    cuts = [0, *(cut for i in found for cut in (at[i], at[i] + len(TAGS[i]))), len(text)]
    pieces = [text[a:b].strip() for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
    inner = dict(zip(found[::2], pieces[1::2], strict=True))
    return inner.get(0), inner.get(2), "".join(pieces[::2])


def parse_reasoning(text: str) -> str | None:
    """The text of the one reasoning part; None when absent, empty or ambiguous.

    >>> parse_reasoning("<reasoning> so </reasoning>")
    'so'
    """
    return (split_reply(text) or (None,))[0] or None


def parse_answer(text: str, choices: Mapping[str, str] | Sequence[str] | None = None) -> str | None:
    """The answer in the one anchored tag; None when absent, empty or ambiguous.

    `choices`: letter -> option text or letters such as "ABCD" (returns a letter), or option texts
    (returns one). Read are "B", "(B)", "B.", an option's text, and "B) text" where the two agree.

    >>> parse_answer("<answer>(b)</answer>", {"A": "virus", "B": "worm"})
    'B'
    """
    given = (split_reply(text) or (None, None))[1] or None
    return given if given is None or choices is None else _pick(given, choices)


def _pick(given: str, choices: Mapping[str, str] | Sequence[str]) -> str | None:
    """The one choice that a text names by label, by its own text, or by both in agreement."""
    if isinstance(choices, Mapping):
        rows = [(letter, letter, text) for letter, text in choices.items()]
    elif isinstance(choices, str) or all(len(c) == 1 and c.isalpha() for c in choices):
        rows = [(letter, letter, "") for letter in choices]
    else:
        rows = list(zip(choices, ascii_uppercase, choices, strict=False))
    named = {v for v, _, t in rows if t == given} or {v for v, _, t in rows if same(given, t)}
    bare, opened = given.strip(" ()[].:"), given.lstrip("([")
    for value, letter, text in rows:
        cut = len(letter)
        labelled = same(opened[:cut], letter) and opened[cut : cut + 1] in {")", "]", ".", ":"}
        if same(bare, letter) or (labelled and same(opened[cut + 1 :].strip(), text)):
            named.add(value)
    return named.pop() if len(named) == 1 else None


def same(given: str, text: str, article: bool = True) -> bool:
    """Whether a reply's text agrees with a text of the data, folded: case, spaces, NFKC forms,
    dashes, Greek letters by name, closing marks, and with `article` False a leading article.

    >>> same(" TNF-\u03b1  Blocker. ", "TNF-alpha blocker"), same("A virus", "virus", article=False)
    (True, True)
    """
    if len(given) > 4 * len(text) + 16:  # NFKC is quadratic in runs of combining marks
        return False
    return _fold(given, article) == _fold(text, article) != ""


_PLAIN = {0x2018: "'", 0x2019: "'", 0x2212: "-"} | dict.fromkeys(range(0x2010, 0x2016), "-")
_PLAIN |= {code: unicodedata.name(chr(code)).split()[-1].lower() for code in range(0x3B1, 0x3CA)}
_PLAIN[0x3BB] = "lambda"  # "LAMDA" to Unicode


@lru_cache(maxsize=8192)
def _fold(text: str, article: bool) -> str:
    words = unicodedata.normalize("NFKC", text).casefold().translate(_PLAIN).split()
    drop = not article and len(words) > 1 and words[0] in ("a", "an", "the")
    return " ".join(words[drop:]).rstrip(" .,;:!?")


def prompt_hash() -> str:
    """The first 12 hex digits of a SHA-256 over what prompts and gold replies are made of."""
    rows = [Example("", task, "Q", "C", ("O", "P"), "O") for task in ("choice", "instruction")]
    shapes = [(messages(row), completion(row)) for row in rows]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
