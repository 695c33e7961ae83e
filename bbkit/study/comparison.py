"""The tables of a recorded study, written between the marks of a page.

Serves every claim: `python -m bbkit.study.comparison RECORD --write FILE` makes from a record
(bbkit.study.recorded) the tables of README.md and notebooks/recorded/README.md; what is compared,
and its intervals, are those of bbkit.study.effects.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bbkit import InputError, exit_code
from bbkit.machine import files
from bbkit.runs import elsewhere, plots, report
from bbkit.study import effects, reasons, recorded, studyplots, verdicts
from bbkit.study.effects import NAMES


def table(kept: Mapping[str, Any]) -> str:
    """What each arm scores, as Markdown, by the measures that are known of any."""
    known = effects.scores(kept)
    shown = [name for name in NAMES if any(name in drawn for drawn, _ in known.values())]
    lines = []
    for arm, (drawn, seeds) in known.items():
        noise = effects.noise_ratio(kept, arm) if arm not in ("base", "sft") else None
        cells = [cell(drawn, name) for name in (*shown, *effects.KL)]
        lines.append([arm, str(seeds), *cells, ratio_cell(noise)])
    heads = ["%", "seeds", *(NAMES[n] for n in shown), *effects.KL.values()]
    return report.markdown([*heads, "noise to signal / grpo"], lines)


def tax(kept: Mapping[str, Any], regime: str) -> str:
    """Every arm of a regime as Markdown: %, then nats a token, then seconds a step.

    Of each kind elsewhere: its loss above the base's, and the KL to the base along it.
    """
    known = effects.scores(kept, regime)
    by_kind = elsewhere.by_kind(known["base"][0])
    shown, kinds = ("domain", "domain_lenient", "general"), by_kind["elsewhere"]
    heads = ["%", "seeds", *(NAMES[n] for n in shown), *(f"{k}: loss, KL" for k in kinds)]
    heads += ["worst loss", "worst KL", *effects.KL.values(), "s a step"]
    lines = []
    for arm, (drawn, seeds) in known.items():
        cells = [cell(drawn, name) for name in shown]
        for kind in kinds:
            cells.append(", ".join(f"{drawn[names[kind]][0]:.3f}" for names in by_kind.values()))
        cells += [cell(drawn, name) for name in (*elsewhere.WORST, *effects.KL)]
        took = [r["seconds"] for n, r in kept["runs"].items() if n.rpartition("-")[0] == arm]
        step = f"{sum(took) / len(took):.2f}" if took and all(took) else ""
        lines.append([arm, str(seeds), *cells, step])
    return report.markdown(heads, lines)


def sources(kept: Mapping[str, Any]) -> str:
    """The same on each data set, strictly and leniently, and on IFEval; empty for one data set."""
    known = effects.scores(kept)
    asked = [m for m in known["base"][0] if " on " in m or m.startswith("ifeval_")]
    heads = [m.replace("domain_lenient on", "leniently:").replace("domain on ", "") for m in asked]
    lines = [[arm, *(cell(drawn, m) for m in asked)] for arm, (drawn, _) in known.items()]
    return report.markdown(["%", *(h.replace("_", " ") for h in heads)], lines) if asked else ""


def cell(drawn: effects.Draws, name: str) -> str:
    """One measure of an arm: %, nats of a loss, or a KL without its interval; empty without it."""
    if name in effects.KL:
        return f"{drawn[name][0]:.3f}" if name in drawn else ""
    seen = effects.described(drawn[name]) if name in drawn else None
    return report.nats(seen) if name in elsewhere.WORST else report.cell(seen)


def ratio_cell(ratio: Mapping[str, Any] | None) -> str:
    """A ratio with its interval; empty for None.

    >>> ratio_cell({"value": 0.9, "interval": [0.8, 1.0]})
    '0.90 [0.80, 1.00]'
    """
    if not ratio:
        return ""
    low, high = ratio["interval"]
    return f"{ratio['value']:.2f} [{low:.2f}, {high:.2f}]"


def variance(kept: Mapping[str, Any], arm: str = "full") -> str:
    """Noise to signal of a group's gradient before GRPO's first step, an arm's by GRPO's."""
    asked = {
        "over all groups": effects.noise_ratio(kept, arm),
        "where entropy is high, by where it is low": effects.noise_by_entropy(kept, arm),
    }
    lines = [
        [name, ratio_cell(seen), str(seen["n"] if seen else 0)] for name, seen in asked.items()
    ]
    return report.markdown(["noise to signal by GRPO's", "ratio", "seeds"], lines)


def changes(kept: Mapping[str, Any], first: str = "grpo") -> str:
    """Each arm minus the `first` on the seeds of both, as Markdown; bold excludes 0."""
    found, lines = effects.by_arm(kept), []
    shown = {name: head for name, head in NAMES.items() if name != "elsewhere"}
    for arm in found:
        known, seeds = effects.change(found, first, arm)
        if seeds and arm != first:
            told = (effects.described(known[m]) if m in known else None for m in shown)
            lines.append([arm, str(seeds), *map(report.change_cell, told)])
    return report.markdown([f"points, minus {first}", "seeds", *shown.values()], lines)


BLOCKS: dict[str, Callable[[Mapping], str]] = {
    "arms": table,
    "sources": sources,
    "changes": changes,
    "variance": variance,
    "tax sft": partial(tax, regime="sft"),
    "tax grpo": partial(tax, regime="grpo"),
    **{family: partial(verdicts.table, family=family) for family in verdicts.FAMILIES},
    **{f"scores of {regime}": partial(reasons.scores, regime=regime) for regime in reasons.REGIMES},
    "title": verdicts.title,
    "untaxed": verdicts.untaxed,
    "steps": reasons.steps,
}


def page(kept: Mapping[str, Any]) -> str:
    """What the commands print: every block that is known of any record."""
    return "\n\n".join(filter(None, (make(kept) for make in (table, sources, changes))))


def filled(text: str, kept: Mapping[str, Any], name: str) -> str:
    r"""A Markdown text with its blocks `<!-- NAME arms -->` to `<!-- end -->` made from a record.

    >>> filled("a\n<!-- pocket arms -->\nold\n<!-- end -->\nb", {}, "smollm2")
    'a\n<!-- pocket arms -->\nold\n<!-- end -->\nb'
    """
    for block, make in BLOCKS.items():
        head, start, rest = text.partition(f"<!-- {name} {block} -->\n")
        if start:
            _, end, tail = rest.partition("<!-- end -->")
            if not end:
                raise InputError(f"block {name} {block}: no <!-- end --> after it; add the line")
            text = f"{head}{start}{make(kept)}\n{end}{tail}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of records, or write them between the marks of a Markdown file."""
    p = argparse.ArgumentParser(prog="python -m bbkit.study.comparison", description=main.__doc__)
    p.add_argument("records", nargs="+", type=Path, metavar="RECORD", help="JSON of bbkit.study")
    p.add_argument("--write", type=Path, metavar="FILE", help="such as README.md")
    p.add_argument("--figures", type=Path, metavar="DIR", help="draw into DIR/figures")
    args = p.parse_args(argv)
    return exit_code(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    try:
        text = args.write.read_text(encoding="utf-8") if args.write else ""
    except OSError as error:
        raise InputError(f"{args.write}: cannot read it ({error.strerror})") from error
    for path in args.records:
        kept = recorded.read(path)
        text = filled(text, kept, path.stem)
        if args.figures:
            made = {
                f"{path.stem}_{name}": figure for name, figure in studyplots.drawn(kept).items()
            }
            plots.save(args.figures, made)
        elif not args.write:
            print(page(kept))
    if args.write:
        files.write_bytes(args.write, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
