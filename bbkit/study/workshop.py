"""Small helps of the notebooks: checks that hint instead of raising, tables, shown replies.

Serves no claim: the notebooks teach with it. Everything measured comes from the other modules.
"""

import contextlib
import gc
import html
import io
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bbkit.prompts import TAGS
from bbkit.runs.plots import color


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
    told = "".join(
        f'<span style="color:{color(name)}">{name} {value:.2g}</span> '
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        code = train.main([*words, "--out", str(folder)])
    gc.collect()  # a trainer and its hooks hold each other, and the model
    sys.modules["torch"].cuda.empty_cache()
    if code:
        return None
    done = record.manifest_of(folder)["stages"]
    minutes = (f"{stage} {facts['seconds'] / 60:.1f}" for stage, facts in done.items())
    print("measured, in minutes:", ", ".join(minutes))
    return folder
