"""IFEval: strict and loose verdicts by lm-eval's checkers, made exact and offline.

Serves the claim of no alignment tax. What differs from lm-eval 0.4.13: langdetect is seeded, punkt
comes from a package, NLTK's clock is off, an argument of 0 counts, a row that makes a checker draw
an argument is an error, and the letters '#' (key 1122) and '!' (key 1129) are counted literally,
where every public checker draws another letter.
"""

import logging
import random
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from bbkit import CannotRun, InputError
from bbkit.prompts import split_reply

# What these checkers' regular expressions cannot match makes them quadratic: 1 MB takes an hour.
CUTS = {
    "detectable_content:number_placeholders": (r"(?m)(^|\])[^\]\n]*$", r"\1"),  # after the last ]
    "detectable_format:title": (r"(?m)(^|>>)(?:(?!>>).)*$", r"\1"),  # after a line's last >>
    "detectable_content:postscript": (r"\s{3,}", "  "),
    "detectable_format:number_bullet_lists": (r"(\n[^\S\n]*\n)\s+", r"\1"),  # third newline on
}


def score_ifeval(rows: Sequence[Mapping], responses: Sequence[str]) -> list[dict[str, Any]]:
    """Per prompt {"key", "strict": [bool, …], "loose": [bool, …]}, a verdict per instruction.

    `rows` are those of IFEval's input_data.jsonl or of the Hub's copy (a None argument is none),
    `responses` their replies in the same order. Loose holds if any of 8 variants of the reply
    follows: whole, less its first line, last line or both, each also without asterisks. An empty
    reply follows nothing. The state of `random` stays as it was. Raises InputError naming the key
    of a malformed row, CannotRun where a package is missing.
    """
    if len(rows) != len(responses):
        raise InputError(f"IFEval: {len(rows)} rows but {len(responses)} responses; give one each")
    registry, scores = _registry(), []
    with _settled():
        work = [_checkers(row, number, registry) for number, row in enumerate(rows, 1)]
        for row, checkers, reply in zip(rows, work, responses, strict=True):
            if not isinstance(reply, str):
                raise InputError(f"IFEval key {row['key']}: the reply is {reply!r:.40}, not text")
            lines = reply.split("\n")
            less = ["\n".join(kept).strip() for kept in (lines[1:], lines[:-1], lines[1:-1])]
            others = {*less, *(text.replace("*", "") for text in (reply, *less))} - {reply}
            strict = [_follows(reply, *pair) for pair in checkers]
            loose = [
                kept or any(_follows(text, *pair) for text in others)
                for kept, pair in zip(strict, checkers, strict=True)
            ]
            scores.append({"key": row["key"], "strict": strict, "loose": loose})
    return scores


def final_answer(text: str) -> str:
    """A reply in the kit's grammar read by its answer only; any other reply as it is.

    The tags alone fail strict IFEval, which would look like tax: report this and the raw text.

    >>> final_answer("<reasoning>Hm.</reasoning><answer>Yes.</answer>")
    'Yes.'
    """
    parts = split_reply(text)
    return text if parts is None or parts[1] is None else parts[1]


@cache
def _registry() -> Mapping[str, type]:
    """lm-eval's checkers by instruction id, with punkt loaded and nothing fetched."""
    try:
        import nltk.redos
        from nltk.tokenize.punkt import save_punkt_params
        from punkt.data import load_bundled

        # lm-eval fetches NLTK's punkt_tab unless it is found. The package holds the same tables:
        # NLTK writes and reads them in a folder (which must be private), and keeps what it read.
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            for part in ("tokenizers", "punkt_tab", "english"):
                folder /= part
                folder.mkdir(mode=0o700)
            nltk.data.path.insert(0, root)
            try:
                save_punkt_params(load_bundled("english"), dir=str(folder))
                from lm_eval.tasks.ifeval import instructions_registry, instructions_util

                instructions_util.count_sentences("Read. Kept.")
                nltk.word_tokenize("Read. Kept.")
            finally:
                nltk.data.path.remove(root)
    except ImportError as error:
        raise CannotRun(f"IFEval lacks {error.name}: pip install -e '.[eval]'") from error
    return instructions_registry.INSTRUCTION_DICT


@contextmanager
def _settled() -> Iterator[None]:
    """Seed langdetect, and stop NLTK's clock (5 s a match: a busy machine would raise)."""
    from langdetect import DetectorFactory as Langdetect
    from nltk import redos

    log = logging.getLogger("lm_eval.tasks.ifeval.instructions")  # would print whole replies
    before, state = (Langdetect.seed, redos.DEFAULT_TIMEOUT, log.disabled), random.getstate()
    try:
        Langdetect.seed, redos.DEFAULT_TIMEOUT, log.disabled = 0, None, True
        yield
    finally:
        Langdetect.seed, redos.DEFAULT_TIMEOUT, log.disabled = before
        random.setstate(state)


def _checkers(row: Mapping, number: int, registry: Mapping) -> list[tuple[str, Any]]:
    """The instruction ids of a row, each with its checker, which has checked one text."""
    where = f"IFEval row {number}, key {row.get('key')}"
    kinds, arguments = row.get("instruction_id_list") or [], row.get("kwargs") or []
    if row.get("key") is None or not kinds or len(kinds) != len(arguments):
        raise InputError(f"{where}: needs a key, an instruction_id_list and as many kwargs")
    pairs, state = [], random.getstate()
    for kind, given in zip(kinds, arguments, strict=True):
        if kind not in registry:
            raise InputError(f"{where}: unknown instruction {kind!r}; see input_data.jsonl")
        checker = registry[kind](kind)
        try:
            known = {name: value for name, value in given.items() if value is not None}
            sign = known.get("letter", "")
            checker.build_description(**known | ({"letter": "a"} if len(sign) == 1 else {}))
            if len(sign) == 1:  # any sign is counted, not only a to z
                checker._letter = sign.lower()
            for pattern in (*known.get("keywords", ()), *known.get("forbidden_words", ())):
                re.compile(pattern)
            checker.check_following(".")  # no letter: langdetect is slow on one
        except (AttributeError, LookupError, TypeError, ValueError, re.error) as error:
            raise InputError(f"{where}: {kind} with {given}: {error}") from error
        if random.getstate() != state:
            raise InputError(f"{where}: {kind} lacks an argument, or one is out of range: {given}")
        pairs.append((kind, checker))
    return pairs


def _follows(text: str, kind: str, checker: Any) -> bool:
    matchable = re.sub(*CUTS[kind], text) if kind in CUTS else text
    try:
        return bool(text.strip() and checker.check_following(matchable))
    except RecursionError:  # JSON nested too deep for Python's reader
        return False
