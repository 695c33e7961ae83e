"""Small helps of the notebooks: checks that hint instead of raising, tables, shown replies.

Serves no claim: the notebooks teach with it. Everything measured comes from the other modules.
"""

import contextlib
import gc
import html
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bbkit import prompts
from bbkit.prompts import TAGS, Example
from bbkit.rewards import REWARDS
from bbkit.runs.looks import color, looks

Hack = tuple[str, str, dict[str, float | None]]  # name, reply, expected score of each reward

FLOODS = {
    "answer tags": "<answer>",
    "closing tags": "</reasoning>",
    "less-than signs": "<",
    "broken tags": "</",
    "NULs": "\0",
    "zero-width spaces": "\u200b",
    "right-to-left marks": "\u202e",
    "stacked accents": "\u0301\u0323",  # NFKC is quadratic in these
    "emoji": "\U0001f9a0\u200d",
    "filler": "Let me think about this step by step. ",
    "one fact": "cholera is caused by Vibrio cholerae. ",
}


def check(name: str, holds: Callable[[], Any], hint: str) -> None:
    """Say whether an exercise is solved; if not, or if it fails, give the hint and no traceback.

    >>> check("sum", lambda: 1 + 1 == 2, "add them")
    ✓ sum
    >>> check("sum", lambda: None + 1 == 2, "add them")
    ✗ sum: add them (TypeError)
    """
    try:
        solved, why = bool(holds()), ""
    except Exception as error:  # a learner's half-written code raises anything
        solved, why = False, f" ({type(error).__name__})"
    print(f"✓ {name}" if solved else f"✗ {name}: {hint}{why}")


def table(rows: Sequence[Mapping[str, Any]], width: int = 46) -> str:
    """Rows as text in columns, cut to `width` characters a cell.

    >>> print(table([{"reply": "so", "domain": 1.0}, {"reply": "no", "domain": None}]))
    reply  domain
    so     1
    no     -
    """

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        text = f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())
        return text if len(text) <= width else text[: width - 1] + "…"

    names = list(rows[0])
    lines = [names, *([cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def shown(reply: str, scores: Mapping[str, float | None] | None = None) -> str:
    """A reply as HTML: the grammar's tags coloured, its scores beneath; for IPython's HTML().

    >>> shown("<answer>a < b</answer>").count("<span")
    2
    """
    text = html.escape(reply)
    for tag in map(html.escape, TAGS):
        style = f"color:{color('reasoning' if 'reasoning' in tag else 'domain')};font-weight:bold"
        text = text.replace(tag, f'<span style="{style}">{tag}</span>')
    look = looks([*(scores or {})])
    told = "".join(
        f'<span style="color:{look[name]["color"]}">{name} {value:.2g}</span> '
        for name, value in (scores or {}).items()
        if value is not None
    )
    return f'<div style="white-space:pre-wrap;font-family:monospace">{text}</div>{told}'


def run(preset: str, folder: Path, stages: str, changes: Sequence[str] = ()) -> Path | None:
    """A run by `bbkit.train` in this process: what is missing of `stages` in `folder`.

    Prints first how long it should take and whether it fits, then what the command prints, then the
    minutes that each stage took. Gives the folder, or None after the line that says what is wrong.
    The stop button saves, and the same call goes on from there. Its `model.backend` is transformers
    unless `changes` say otherwise: unsloth has to be imported before it, and a notebook has it.
    """
    from bbkit import train
    from bbkit.runs import record

    changes = ("model.backend=transformers", *changes)
    words = ["--preset", preset, "--stages", stages, *(f"--set={change}" for change in changes)]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = train.main([*words, "--dry-run"])
    for line in told.getvalue().splitlines():
        if line.startswith(("minutes", "fits", "does not fit")):
            print(line)
    if code:
        return None
    import datasets

    datasets.disable_progress_bars()  # of rows; the bar of the steps stays
    code = train.main([*words, "--out", str(folder)])
    gc.collect()  # a trainer and its hooks hold each other, and the model
    sys.modules["torch"].cuda.empty_cache()
    if code:
        return None
    done = record.manifest_of(folder)["stages"]
    minutes = (f"{stage} {facts['seconds'] / 60:.1f}" for stage, facts in done.items())
    print("measured, in minutes:", ", ".join(minutes))
    return folder


def command(words: Sequence[str], folder: Path, minutes: float = 10) -> int:
    """Run `python -m …` in `folder`, show what it says as it says it, and give its exit code.

    With one thread where other work has the cores: two would wait for each other. After `minutes`
    it is stopped, saves, and how to go on is said.
    """
    cores, words = os.cpu_count() or 1, [sys.executable, "-u", *words[1:]]
    alone = os.getloadavg()[0] < cores / 2
    print("threads:", "as PyTorch chooses" if alone else "1, other work has the cores", flush=True)
    env = os.environ if alone else os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    late = threading.Timer(60 * minutes, process.terminate)
    late.start()
    try:
        for part in iter(lambda: process.stdout.read1(), b""):  # type: ignore[union-attr]
            print(part.decode(errors="replace"), end="", flush=True)
        code = process.wait()
    finally:
        process.terminate()
        late.cancel()
    if code == 130:
        print(f"stopped after {minutes:g} minutes; run the cell again to go on, or raise `minutes`")
    return code


def hack_gallery(example: Example, size: int = 2000) -> list[Hack]:
    """Replies that try to earn without answering, and what each must get.

    `domain` and `format` are exact, `reasoning` is the most that the reply may get. `example` must
    pass `validate`; `size` (2000 or more) is the length in characters of the long replies.

    >>> hack_gallery(Example("1", "short", "Cause?", answer="virus"))[0]
    ('empty', '', {'domain': 0, 'reasoning': 0, 'format': 0})
    """
    if example.task == "instruction":
        blank = ("empty", ""), ("blanks", " \n" * (size // 2))
        return [(*hack, {"domain": None, "reasoning": None, "format": 0.0}) for hack in blank]
    why, gold = example.reasoning, prompts.parse_answer(prompts.completion(example)) or ""
    wrong = next((o for o in example.options if o != example.answer), "no")
    options, asked = example.options or (gold, wrong), prompts.messages(example)[-1]["content"]
    reply = "<reasoning>{}</reasoning><answer>{}</answer>".format
    right, spam = reply(why, gold), "".join(f"<answer>{option}</answer>" for option in options)
    half = 0.5 if example.steps else 1  # prose is not held against the facts
    gallery = [
        ("empty", "", 0, 0, 0),
        ("empty reasoning", reply("", gold), 1, 0, 1),
        ("empty answer", reply(why, ""), 0, 0.5, 1),
        ("only the answer", f"<answer>{gold}</answer>", 1, 0, 0),
        ("two answers", f"{right}<answer>{wrong}</answer>", 0, 0, 0),
        ("every option answered", reply(why, ", ".join(options)), 0, 0.5, 1),
        ("an answer tag per option", f"<reasoning>{why}</reasoning>{spam}", 0, 0, 0),
        ("wrong under the gold reasoning", reply(why, wrong), 0, half, 1),
        ("answer in both parts", reply(f"{why}<answer>{gold}</answer>", gold), 0, 0, 0),
        ("answer nested", f"<reasoning><answer>{gold}</answer></reasoning>", 0, 0, 0),
        ("answer first", f"<answer>{gold}</answer><reasoning>{why}</reasoning>", 0, 0, 0),
        ("unclosed answer", right.removesuffix("</answer>"), 0, 0, 0),
        ("tag stuffing", "".join(prompts.TAGS) * 3 + right, 0, 0, 0),
        ("gold hidden in prose", f"{why} The answer is {gold}.", 0, 0, 0),
        ("gold beside a wrong tag", f"{reply(why, wrong)} It is {gold}.", 0, half, 0.5),
        ("text outside", f"Sure! {right} Hope it helps.", 1, 1, 0.5),
        ("zero-width in the tag", right.replace("<answer>", "<ans\u200bwer>"), 0, 0, 0),
        ("zero-width in the answer", reply(why, f"{gold[:1]}\u200b{gold[1:]}"), 0, 0.5, 1),
        ("question copied", reply(asked, gold), 1, 0.5 if example.steps else 0, 1),
        ("reasoning repeated", reply(f"{why} " * 20, gold), 1, 0.1, 1),
        ("padded with blanks", reply(why, " " * (size // 2) + gold + "\n" * (size // 2)), 1, 1, 1),
        ("gold over and over", reply(why, f"{gold} " * (size // len(gold) + 2)), 0, 0.5, 1),
        ("nested", "<reasoning>" * (size // 23) + "</reasoning>" * (size // 23), 0, 0, 0),
    ]
    for name, unit in FLOODS.items():
        flood = unit * (size // len(unit) + 1)
        gallery.append((f"flood of {name}", flood, 0, 0, 0))
        if not any(tag in flood for tag in prompts.TAGS):
            gallery.append((f"reasoning full of {name}", reply(flood, gold), 1, 0.1, 1))
            gallery.append((f"answer full of {name}", reply(why, flood), 0, 0.5, 1))
    return [(name, text, dict(zip(REWARDS, marks, strict=True))) for name, text, *marks in gallery]
