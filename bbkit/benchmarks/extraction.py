"""The letter that a model commits to in free-form benchmark output, by one documented rule.

Serves the accuracy claims on MedQA and BIOMED-MMLU, where published scorers read "vitamin D" as D.
The strongest kind of statement that is there decides, alone: 1. the kit's answer tag, 2. a JSON
field, 3. a boxed letter, 4. a sentence such as "the answer is (C)", 5. what the last line finds, as
"the best next step is C. Text", 6. a first or last line that is a label. Two letters of that kind,
a hedge or a denial give None: never a guess. How each is said: `bbkit.benchmarks.patterns`.
"""

import re
from collections.abc import Iterator
from unicodedata import normalize

from bbkit import prompts
from bbkit.benchmarks import patterns


def extract_choice(text: str, letters: str = "ABCD") -> str | None:
    """The one letter of `letters` that `text` commits to, or None; see the module for the rule.

    >>> extract_choice("Vitamin D is out. The answer is (C)."), extract_choice("It is vitamin D.")
    ('C', None)
    >>> extract_choice('{"step_by_step_thinking": "...", "answer_choice": "B"}')
    'B'
    >>> extract_choice("The answer is A or B."), extract_choice("The answer is C. difficile.")
    (None, None)
    """
    text = re.split("</think(?:ing)?>", text)[-1].partition("<think>")[0]  # one that was cut off
    text = text if "<answer>" in text else text.rpartition("</reasoning>")[2]
    after = patterns.AFTERWARDS.search(text)
    if after and (first := extract_choice(text[: after.start()], letters)):
        return first
    text = patterns.FORMS.sub(lambda m: normalize("NFKC", m[0]), text)
    text = patterns.PLAIN.sub("", patterns.TOKENS.sub("\n", text.translate(patterns.STOPS))).strip()
    for kind in (_tag, _json, _boxed, _sentences, _concluded, _lines):
        found = set(kind(text, letters))
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _tag(text: str, letters: str) -> Iterator[str | None]:
    if "<answer>" in text:
        given = (prompts.split_reply(text) or (None, None))[1]
        yield _whole(given or "", letters)


def _json(text: str, letters: str) -> Iterator[str | None]:
    fields = [(m[1], "".join(m.groups("")[1:])) for m in re.finditer(patterns.FIELD, text)]
    answers = [given for name, given in fields if "answer" in name.lower()]  # over an "option"
    yield from (_whole(given, letters) for given in answers or [given for _, given in fields])


def _boxed(text: str, letters: str) -> Iterator[str | None]:
    shape = r"\\boxed\s{0,4}\{((?:[^{}]|\{[^{}]{0,200}\}){0,200})\}"
    for match in re.finditer(shape, text):
        if not patterns.REFUSED.match(text[match.end() : match.end() + 40].lstrip(" $")):
            yield _whole(match[1], letters)


def _whole(given: str, letters: str) -> str | None:
    """Of a field that is a letter or begins with a label: "C", "(c)", "C. text", "option C"."""
    given = re.sub(r"\\(?:boxed|text|math|bf)[a-z]*\b|[{}]", "", given.strip())
    given = re.sub(patterns.LEAD, "", given).strip(" *_`'\"$")
    bare = given.strip(" ()[].:")
    if len(bare) == 1 and bare.upper() in letters:
        return bare.upper()
    return _label(given, 0, letters)


def _label(text: str, at: int, letters: str) -> str | None:
    """The letter that stands at `at` as a label of its own and not as part of a name."""
    small = f"[{letters.lower()}]"
    enclosed = rf"(?<=[(\['\"‘“]){small}(?=[)\]'\"’”])"
    shape = rf"([(\[]?)([{letters}]|{enclosed}|{small}(?={patterns.SMALL}))([)\]]?)"
    match = re.compile(shape).match(text, at)
    if not match or (bool(match[1]) != bool(match[3]) and match[1]):
        return None
    rest = re.sub(r"^[*_`\"'”’$}>]{1,6}", "", text[match.end() : match.end() + 80])
    link = (
        r"\.{0,3}\s{0,3}(?:,\s{0,3}(?:and|or|then)?|[/&+;]|\(?(?:and|or)\b|as\swell\sas\b)\s{0,3}"
    )
    apart = r"\b(?!['’]|\s(?:is|was|are|would|can|does|fails)\b)"
    other = (
        rf"[(\['\"‘“]?(?:[{letters}]{apart}|{small}(?:[)\].,;'\"’”]|\s{{0,3}}(?:$|\n|and\b|or\b)))"
    )
    # a second label: "A) Heparin, C) Warfarin"
    further = rf"[(\[][{letters}][)\]]|[{letters}]\)|[{letters}]\.(?=\s[A-Z][a-z])"
    listed = rf"\s?[(\[][{letters}][)\]]|\.?[^.\n]{{1,60}}(?:,|\band|\bor)\s(?:{further})"
    if re.match(rf"{link}(?i:{patterns.KIND}\s)?{other}|{listed}", rest):
        return None
    if rest.lstrip().startswith("?") or patterns.TAKEN_BACK.match(rest):
        return None
    letter = match[2].upper()
    if letter == letters[0] and re.match(rf"[^\n]{{1,60}}?\s[(\[]?{letters[1:2]}[).\]]\s", rest):
        return None  # "A. Aspirin B. Heparin", on one line
    if match[3] or re.match(r"['\"‘“`].['\"’”`]", text[max(0, at - 1) : match.end() + 1]):
        return letter
    word = re.match(r"\.\s{0,3}([A-Za-z]+)", rest)
    if word and re.search(rf"{letter}[a-z ]* {word[1].casefold()}\b", patterns.EPITHETS):
        return None
    ended = (
        r"(?:[,;:)(\]!…]|\.(?:(?!\w)|(?=[A-Z][a-z]{2}))|[.]?\s{0,3}(?:$|\n)|\s{1,3}[-–—(:]|"
        r"\s?(?:です|입니다)|\s(?:and\snot|i\.?e)\b)"
    )
    if re.match(ended, rest) or not rest.strip():
        return letter
    word = re.match(r"\s{1,3}([a-z]+)\b", rest)
    return letter if word and word[1] in patterns.AFTER else None


def _sentences(text: str, letters: str) -> Iterator[str | None]:
    hedge = re.compile(rf"[(\[]?[{letters}][)\]]?\s{{0,3}}(?:,|/|&|\+|\(?(?:and|or)\b|as\swell)")
    for pattern in (patterns.SENTENCE, patterns.SHORT, patterns.CHOSEN):
        for match in pattern.finditer(text):
            letter = _label(text, match.end(), letters)
            behind = text[match.end() : match.end() + 600]
            listed = letter == letters[0] and _listed(behind, letters)
            if listed or patterns.OF_MANY.search(text[max(0, match.start() - 30) : match.start()]):
                continue
            if (letter or hedge.match(text, match.end())) and not _denied(text, match):
                yield letter
    if re.search(patterns.ALSO.format(letters), text):
        yield None
    for match in re.finditer(patterns.BEHIND.format(letters), text):
        if not _denied(text, match) and not re.search(r"\b(?:not|neither)\b|n['’]t", match[1]):
            yield match[2]
    for shape in (patterns.RIGHT, patterns.BARE, patterns.IT):
        for match in re.finditer(shape.format(letters), text):
            before = text[max(0, match.start() - 200) : match.start()]
            group = shape is patterns.IT and re.search(patterns.LETTERED, before)
            if not group and not _denied(text, match):
                yield match[1].upper()


def _concluded(text: str, letters: str) -> Iterator[str | None]:
    """The label in the last line's last "is C. Text" or "is option C", weighed and not doubted."""
    line = "".join(_bare(text)[-1:])[-500:]
    for aside in re.finditer(patterns.ASIDE.format(letters), line):
        before = re.split(r"[.!?]\s(?=[A-Z][a-z])", line[: aside.start()])[-1]
        if patterns.WEIGHED.search(before) and not patterns.DOUBTED.search(before):
            yield aside[1]
    for match in [*re.finditer(patterns.FIRM.format(letters), line)][-1:]:
        before = re.split(r"[.!?]\s(?=[A-Z][a-z])", line[: match.start()])[-1]
        doubt = patterns.DOUBTED.search(before[-60:]) or re.search(patterns.LETTERED, before)
        letter = _label(line, match.end(), letters)
        if letter and patterns.WEIGHED.search(before) and not doubt:
            yield letter


def _listed(text: str, letters: str) -> bool:
    """Whether a text that begins with the first option goes on with the second: no answer."""
    lines = _bare(text)
    second = re.match(rf"[(\[]?{letters[1:2]}{patterns.MARKED}", "".join(lines[1:2]))
    if not second or patterns.DISMISSED.match(lines[1], second.end()):
        return False
    return not patterns.REFUSED.search(lines[1][:300])


def _bare(text: str) -> list[str]:
    return [bare for line in text.splitlines() if (bare := line.strip(" *_`>#-\t"))]


def _denied(text: str, match: re.Match) -> bool:
    before = text[max(0, match.start() - 200) : match.start()]
    if "would be" in match[0] and patterns.SUPPOSED.search(before):
        return True
    return patterns.UNSURE.search(before[-60:]) is not None


def _lines(text: str, letters: str) -> Iterator[str | None]:
    text = text.upper() if len(text.strip(" *_`")) == 1 else text  # "b", and nothing else
    lines = _bare(text)
    if not lines:
        return
    head = rf"(?i:option|choice)\W{{1,3}}([{letters}])\b"
    heads = {m[1] for line in lines if (m := re.match(head, line))}
    labelled = [_line(line, letters) for line in lines]
    alone = lines[0].strip(patterns.PUNCTUATION)
    if len(alone) == 1 and alone in letters:  # and then an explanation, with labels
        yield alone
    elif len(heads) > 1 or len({x for x in labelled if x}) > 1:
        yield None
    elif labelled[0]:
        yield labelled[0]
    elif (last := labelled[-1]) and not patterns.BROKEN.search(lines[-2]):
        yield None if last == letters[0] and patterns.LISTS.search(lines[-2][-200:]) else last


def _line(line: str, letters: str) -> str | None:
    """The letter of a line that is a label, or a label and an option's text, not refused."""
    given = line[patterns.LAST.match(line).end() :]  # type: ignore[union-attr]
    bare = given.strip(patterns.PUNCTUATION)
    if len(bare) == 1 and (bare in letters or (bare.upper() in letters and line != bare)):
        return bare.upper()
    reason = rf"[{letters}][*_]{{0,3}},?\s(?:because|since)\b"
    shape = rf"[(\[]?[{letters}]{patterns.MARKED}|\(?[{letters.lower()}][.)]\s"
    labelled = re.match(rf"{shape}|{reason}(?!.*\b{reason})", given)
    # "A: text" may be an answer to "Q:".
    if not labelled or given.startswith("A:"):
        return None
    clause = re.split(r"[.;,]", given[labelled.end() : labelled.end() + 300])[0]
    if patterns.REFUSED.search(clause) or patterns.DISMISSED.match(clause):
        return None
    return _label(given, 0, letters)
