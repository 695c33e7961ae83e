"""The tables of a recorded study, and the verdict on each claim by its rule.

Serves every claim: `python -m bbkit.study.comparison RECORD --write FILE` makes from a record
(bbkit.study.recorded) the tables of README.md and notebooks/recorded/README.md; what is compared, and its
intervals, are those of bbkit.study.effects.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bbkit import InputError, exit_code
from bbkit.machine import files
from bbkit.runs import elsewhere, plots, report
from bbkit.study import effects, recorded, studyplots

NAMES = {
    "domain": "domain",
    "domain_lenient": "leniently",
    "reasoning": "reasoning",
    "instruction": "instructions",
    "general": "general",
    "elsewhere": "elsewhere (nats)",  # the worst kind of bbkit.runs.elsewhere
    "worse": "worse",
    "hypervolume": "hypervolume",
    "equal_kl": "general, at equal KL",  # known of differences between arms alone
}
MARGIN = 0.02  # a difference that does not matter
NEAR = (0.9, 1.1)  # a ratio that does not matter
JUDGED = ("compared", "effect", "seeds", "verdict")  # columns of a ledger


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
    seen = effects.told(drawn[name]) if name in drawn else None
    return report.nats(seen) if name in elsewhere.WORST else report.cell(seen)


def changes(kept: Mapping[str, Any], first: str = "grpo") -> str:
    """Each arm minus the `first` on the seeds of both, as Markdown; bold excludes 0."""
    found, lines = effects.arms(kept), []
    per_nat = effects.slope(found)
    shown = {name: head for name, head in NAMES.items() if name != "elsewhere"}
    for arm in found:
        known, seeds = effects.change(found, first, arm, per_nat)
        if seeds and arm != first:
            told = (effects.told(known[m]) if m in known else None for m in shown)
            lines.append([arm, str(seeds), *map(report.change_cell, told)])
    return report.markdown([f"points, minus {first}", "seeds", *shown.values()], lines)


def ratio_cell(ratio: Mapping[str, Any] | None) -> str:
    """A ratio with its interval; empty for None.

    >>> ratio_cell({"value": 0.9, "interval": [0.8, 1.0]})
    '0.90 [0.80, 1.00]'
    """
    if not ratio:
        return ""
    low, high = ratio["interval"]
    return f"{ratio['value']:.2f} [{low:.2f}, {high:.2f}]"


def verdict(measure: Mapping[str, Any] | None, sign: int, none: float = 0.0) -> str:
    """The rule for an effect which is claimed to lie above (`sign` 1) or below `none`.

    *reproduced*: the 95 % interval lies on the claimed side. *not reproduced*: it lies on the other
    side, or where no difference matters (a ratio, `none` 1: 0.9 to 1.1; else within 2 points).
    `sign` 0, claimed to cost nothing: above, or below, 2 points lower.

    >>> verdict({"value": 1.0, "interval": [0.95, 1.05]}, -1, none=1.0)
    'not reproduced'
    """
    if not measure:
        return "not attempted"
    low, high = measure["interval"]
    above, below = (low > none, high < none) if sign else (low > -MARGIN, high < -MARGIN)
    claimed, other = (below, above) if sign < 0 else (above, below)
    least, most = NEAR if none else (-MARGIN, MARGIN)
    if claimed:
        return "reproduced"
    near = sign != 0 and least <= low <= high <= most
    return "not reproduced" if other or near else "inconclusive"


# (claim, before, after, measure, the side on which its effect is claimed to lie; 0: costs nothing)
CLAIMS = (
    ("aligning to biomedicine costs instruction following", "base", "sft", "general", -1),
    ("GRPO with the three rewards gives it back", "sft", "grpo", "general", 1),
    ("GRPO raises domain accuracy above SFT", "sft", "grpo", "domain", 1),
    ("a dynamic hybrid reward beats a static one", "static", "dynamic", "worse", 1),
    ("the same, by hypervolume", "static", "dynamic", "hypervolume", 1),
    ("orthogonality with retention forgets less", "dynamic", "full", "general", 1),
    ("the same, at equal KL to the base", "dynamic", "full", "equal_kl", 1),
    ("orthogonality alone forgets less", "dynamic", "orthogonal", "general", 1),
    ("the whole method raises domain accuracy", "base", "full", "domain_lenient", 1),
    ("that costs no instruction following", "base", "full", "general", 0),
    ("the whole method beats plain GRPO", "grpo", "full", "hypervolume", 1),
    ("it beats GDPO", "gdpo", "full", "hypervolume", 1),
    ("it beats weight averaging", "averaging", "full", "hypervolume", 1),
    ("orthogonality beats random coefficients", "random", "orthogonal", "hypervolume", 1),
    ("PCGrad forgets less", "dynamic", "pcgrad", "general", 1),
    ("UPGrad forgets less", "dynamic", "upgrad", "general", 1),
    ("Aligned-MTL forgets less", "dynamic", "aligned_mtl", "general", 1),
    # committed when one of these nine runs had ended, pcgrad_retention-3; its score was unread
    ("PCGrad with retention forgets less", "dynamic", "pcgrad_retention", "general", 1),
    ("UPGrad with retention forgets less", "dynamic", "upgrad_retention", "general", 1),
    ("Aligned-MTL with retention forgets less", "dynamic", "aligned_mtl_retention", "general", 1),
    ("weights by variance beat static ones", "static", "variance", "hypervolume", 1),
    ("weights by covariance beat static ones", "static", "covariance", "hypervolume", 1),
    ("weights by agreement beat static ones", "static", "agreement", "hypervolume", 1),
    ("rewards by rules and a model beat rules alone", "grpo", "judged", "domain", 1),
    ("questions of two hops teach more than single facts", "plain", "grpo", "domain", 1),
)
# Those that the abstract makes itself: README's table.
MAIN = (
    "aligning to biomedicine costs instruction following",
    "GRPO with the three rewards gives it back",
    "a dynamic hybrid reward beats a static one",
    "orthogonality with retention forgets less",
    "the whole method raises domain accuracy",
    "that costs no instruction following",
    "the whole method beats plain GRPO",
    "capability-aware GRPO has less gradient variance",
)
LATER = 3  # pocket's seeds from this one on ran after all of MAIN had been committed (b346429)
# Why nothing beats plain GRPO on pocket, each with the change that would then help; written down
# before any of these arms had run.
HYPOTHESES = (
    ("Adam steps off the cone's sum: its inner product helps", "full", "full_adam",
     "hypervolume", 1),
    ("60 steps are too few for a rate of 0.1: ten times it helps", "dynamic", "dynamic_fast",
     "hypervolume", 1),
    ("the floor of 0.1 throws away what nearly settled rewards say: 0.01 helps", "static",
     "static_unfloored", "hypervolume", 1),
)  # fmt: skip


def claims(kept: Mapping[str, Any]) -> str:
    """The ledger as Markdown: each claim, what was compared, effect, seeds, verdict by the rule."""
    lines = judged_rows(kept, CLAIMS)
    for claim, compared, ratio in (
        ("capability-aware GRPO has less gradient variance", "noise to signal: full / grpo",
         effects.noise_ratio(kept, "full")),
        ("the more so where entropy is high", "that ratio: high / low entropy",
         effects.noise_by_entropy(kept, "full")),
    ):  # fmt: skip
        n = str(ratio["n"]) if ratio else ""
        lines.append([claim, compared, ratio_cell(ratio), n, verdict(ratio, -1, 1.0)])
    return report.markdown(["claim", *JUDGED], lines)


def attempted(kept: Mapping[str, Any], ledger: Callable[[Mapping], str] = claims) -> str:
    """The ledger without the claims of which the record has no arms; empty without any."""
    lines = [line for line in ledger(kept).splitlines() if "not attempted" not in line]
    return "\n".join(lines) if len(lines) > 2 else ""


def main_claims(kept: Mapping[str, Any], since: int = 0) -> str:
    """The ledger's lines of the claims in MAIN, on the seeds from `since` on."""
    runs = {n: run for n, run in kept["runs"].items() if int(n.rpartition("-")[2]) >= since}
    head, rule, *lines = claims({**kept, "runs": runs}).splitlines()
    return "\n".join([head, rule, *(x for x in lines if x[2:].partition(" |")[0] in MAIN)])


def hypotheses(kept: Mapping[str, Any]) -> str:
    """HYPOTHESES as Markdown, with the verdicts of the same rule."""
    return report.markdown(["hypothesis", *JUDGED], judged_rows(kept, HYPOTHESES))


def judged_rows(kept: Mapping[str, Any], rows: Iterable[tuple]) -> list[list[str]]:
    """What is said, and JUDGED: what was compared, its effect, seeds, verdict by the rule."""
    found = effects.arms(kept)
    per_nat, lines = effects.slope(found), []
    for said, before, after, name, sign in rows:
        known, seeds = effects.change(found, before, after, per_nat)
        seen = effects.told(known[name]) if name in known else None
        judged = verdict(seen, sign)
        if before == "dynamic" and judged == "reproduced" and known["domain"][0] < -MARGIN:
            judged = "inconclusive"  # forgetting less by learning less
        effect, count = report.change_cell(seen), str(seeds) if seen else ""
        lines.append([said, f"{NAMES[name]}: {after} − {before}", effect, count, judged])
    return lines


BLOCKS: dict[str, Callable[[Mapping], str]] = {
    "arms": table,
    "sources": sources,
    "changes": changes,
    "claims": claims,
    "main": main_claims,
    "later": partial(main_claims, since=LATER),
    "attempted": attempted,
    "hypotheses": hypotheses,
    "tax sft": partial(tax, regime="sft"),
    "tax grpo": partial(tax, regime="grpo"),
}


def told(kept: Mapping[str, Any]) -> str:
    """What the commands print: every block once, of claims and hypotheses those with arms here."""
    made = [make(kept) for make in (table, sources, changes, attempted)]
    return "\n\n".join(block for block in (*made, attempted(kept, hypotheses)) if block)


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
            taxed = "penalty" in effects.arms(kept)
            figure = (studyplots.tax_front if taxed else studyplots.front)(kept)
            plots.save(args.figures, {f"{path.stem}_front": figure})
        elif not args.write:
            print(told(kept))
    if args.write:
        files.write_bytes(args.write, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
