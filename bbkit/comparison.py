"""Arms of a recorded study against each other, and the verdict on each claim by its rule.

Serves every claim: `python -m bbkit.comparison RECORD --write README.md` makes README's tables from
a record (bbkit.recorded). An interval is over training seeds and over diseases or prompts at once
(pigeonhole bootstrap, Owen 2007, doi 10.1214/07-AOAS122): the recipe run again and asked other
questions. `general` is instruction following of kinds that no stage trains on, strict IFEval where
it was asked; `worse` the worse of it and domain accuracy, `hypervolume` the area that both span.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbkit import config, evaluate, files, recorded, report, statistics
from bbkit.config import InputError
from bbkit.recorded import Rows

if TYPE_CHECKING:
    import numpy as np

SHOWN = {
    "domain": "domain",
    "domain_lenient": "leniently",
    "reasoning": "reasoning",
    "instruction": "instructions",
    "general": "general",
    "worse": "worse",
    "hypervolume": "hypervolume",
}
KL = {"kl": "KL, questions", "kl_instruction": "KL, instructions"}
MARGIN = 0.02  # a difference that does not matter
NEAR = (0.9, 1.1)  # a ratio that does not matter
Draws = dict[str, "np.ndarray"]  # of each measure: the value, then its bootstrap draws


def arms(kept: Mapping[str, Any]) -> dict[str, dict[int, Rows]]:
    """Item rows by stage of every arm and seed of a record; `sft` is what the others began with."""
    found: dict[str, dict[int, Rows]] = {}
    for name in kept["runs"]:
        arm, _, seed = name.rpartition("-")
        found.setdefault(arm, {})[int(seed)] = recorded.unpack(kept, name)
    return found


def last(rows: Rows) -> Sequence[Mapping]:
    """Item rows of an arm's final model."""
    return rows["grpo"] if "grpo" in rows else rows["sft"]


def models(found: Mapping[str, Mapping[int, Rows]]) -> dict[str, list[Sequence[Mapping]]]:
    """Item rows of each seed's last model, by arm; `base` is the untrained one."""
    rows: dict[str, list[Sequence[Mapping]]] = {"base": [r["base"] for r in found["sft"].values()]}
    return rows | {arm: [last(r) for r in seeds.values()] for arm, seeds in found.items()}


def draws(runs: Sequence[Sequence[Mapping]], count: int = 2000) -> Draws:
    """Every measure of one arm: its mean, and the means of `count` resamples of seeds and clusters.

    `runs` are the item rows of each seed. Two arms asked the same prompts over as many seeds draw
    the same seeds and clusters, so that their differences are paired.

    >>> rows = [{"id": "1", "task": "short", "entity": "e", "scores": {"domain": 0.5}}]
    >>> draws([rows, rows], 3)["domain"]
    array([0.5, 0.5, 0.5, 0.5])
    """
    import numpy as np

    found = {}
    for name in (*evaluate.MEASURES, *KL):
        cells: list[dict[str, list[float]]] = []
        for rows in runs:
            cells.append({})
            for row in rows:
                value = row["scores"].get(name)
                if name in KL and (row["task"] == "instruction") == (name != "kl"):
                    value = row.get("kl")
                if value is not None:
                    cell = cells[-1].setdefault(evaluate.cluster(row), [0.0, 0.0])
                    cell[0] += value
                    cell[1] += 1
        if all(cells):
            table = np.array([[cell[c] for c in cells[0]] for cell in cells])
            found[name] = statistics.crossed(table, count)
    for name in ("instruction_unseen", "ifeval_strict"):
        if name in found:
            found["general"] = found[name]
    if {"domain", "general"} <= set(found):
        found["worse"] = np.minimum(found["domain"], found["general"])
        found["hypervolume"] = found["domain"] * found["general"]
    return found


def told(values: np.ndarray) -> dict[str, Any]:
    """The measure of a value followed by its draws: {"value", "interval"}."""
    import numpy as np

    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "interval": [float(low), float(high)]}


def change(
    found: Mapping[str, Mapping[int, Rows]], before: str, after: str, count: int = 2000
) -> tuple[dict[str, np.ndarray], int]:
    """Draws of arm `after` minus arm `before` over the seeds of both, and how many these are.

    `base` is the untrained model of either.
    """
    first = found.get("sft" if before == "base" else before, {})
    seeds = sorted(set(first) & set(found.get(after, {})))
    if not seeds:
        return {}, 0
    rows = [first[seed]["base"] if before == "base" else last(first[seed]) for seed in seeds]
    earlier, later = draws(rows, count), draws([last(found[after][s]) for s in seeds], count)
    return {k: later[k] - earlier[k] for k in later if k in earlier}, len(seeds)


def slope(found: Mapping[str, Mapping[int, Rows]]) -> float:
    """`general` per nat of KL on instructions, over arms and seeds.

    Least squares through the base, at KL 0: how much is forgotten for how far a model went.
    """
    up = down = 0.0
    for by_seed in found.values():
        for rows in by_seed.values():
            base, tuned = draws([rows["base"]], 0), draws([last(rows)], 0)
            if {"kl_instruction", "general"} <= set(tuned):
                kl = float(tuned["kl_instruction"][0])
                up += kl * float(tuned["general"][0] - base["general"][0])
                down += kl**2
    return up / down if down else 0.0


def table(kept: Mapping[str, Any]) -> str:
    """What each arm scores, as Markdown."""
    found = arms(kept)
    lines = [["%", "seeds", *SHOWN.values(), *KL.values(), "gradient noise"]]
    lines.append(["---"] * len(lines[0]))
    for arm, rows in models(found).items():
        known = draws(rows)
        cells = [report.cell(told(known[m])) if m in known else "" for m in SHOWN]
        cells += [f"{known[k][0]:.3f}" if k in known else "" for k in KL]
        noise = noise_ratio(kept, arm) if arm not in ("base", "sft") else None
        lines.append([arm, str(len(rows)), *cells, ratio_cell(noise)])
    return markdown(lines)


def changes(kept: Mapping[str, Any], first: str = "grpo") -> str:
    """Each arm minus the `first` on the seeds of both, as Markdown; bold excludes 0."""
    found = arms(kept)
    lines = [[f"points, minus {first}", "seeds", *SHOWN.values()]]
    lines.append(["---"] * len(lines[0]))
    for arm in found:
        known, seeds = change(found, first, arm) if arm != first else ({}, 0)
        if seeds:
            cells = [report.change_cell(told(known[m])) if m in known else "" for m in SHOWN]
            lines.append([arm, str(seeds), *cells])
    return markdown(lines)


def markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def noise_ratio(kept: Mapping[str, Any], arm: str) -> dict[str, Any] | None:
    """Noise to signal of an arm's gradient over GRPO's at the same SFT, geometric mean over seeds.

    The intervals are those of the probes, joined; None where none shows a signal above the noise.
    """
    rows = [row for row, _ in _probed(kept, arm)]
    if not rows:
        return None
    middle = sum(math.log(row["ratio"]) for row in rows) / len(rows)
    errors = (math.log(row["interval"][1] / row["interval"][0]) / 2 for row in rows)
    half = math.sqrt(sum(e**2 for e in errors)) / len(rows)
    bounds = [math.exp(middle - half), math.exp(middle + half)]
    return {"value": math.exp(middle), "interval": bounds, "n": len(rows)}


def noise_by_entropy(kept: Mapping[str, Any], arm: str) -> dict[str, Any] | None:
    """That ratio among the groups above the median entropy over the one among those below it.

    Geometric mean with Student's interval over seeds; None with fewer than two.
    """
    logs = [
        math.log(row["high"] / plain["high"]) - math.log(row["low"] / plain["low"])
        for row, plain in _probed(kept, arm)
        if all(kind[part] and kind[part] > 0 for kind in (row, plain) for part in ("high", "low"))
    ]
    if len(logs) < 2:
        return None
    found = statistics.over_seeds(logs)
    bounds = [math.exp(bound) for bound in found["interval"]]
    return {"value": math.exp(found["value"]), "interval": bounds, "n": len(logs)}


def _probed(kept: Mapping[str, Any], arm: str) -> Iterator[tuple[Mapping, Mapping]]:
    """Probe rows of an arm's scheme and of GRPO, of each seed that shows a signal."""
    for name, run in kept["runs"].items():
        if name.rpartition("-")[0] == arm and run["grpo"] and run["from"]:
            combined = run["grpo"]["combination"]
            scheme = run["grpo"]["advantages"] + ("" if combined == "sum" else f" + {combined}")
            noise = kept["runs"][run["from"]]["noise"] or {}
            row = noise.get(scheme)
            if row and None not in (row["ratio"], *row["interval"]):
                yield row, noise["grpo"]


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
    """README's rule for an effect which is claimed to lie above (`sign` 1) or below `none`.

    *reproduced*: the 95 % interval lies on the claimed side. *not reproduced*: it lies on the other
    side, or where no difference matters (a ratio, `none` 1: 0.9 to 1.1; else within 2 points).

    >>> verdict({"value": 0.05, "interval": [0.01, 0.09]}, 1)
    'reproduced'
    >>> verdict({"value": 0.05, "interval": [-0.01, 0.09]}, 1)
    'inconclusive'
    >>> verdict({"value": 1.0, "interval": [0.95, 1.05]}, -1, none=1.0)
    'not reproduced'
    """
    if not measure or not measure["interval"]:
        return "not attempted"
    low, high = measure["interval"]
    if (low > none) if sign > 0 else (high < none):
        return "reproduced"
    near = NEAR if none else (-MARGIN, MARGIN)
    other = (high < none) if sign > 0 else (low > none)
    return "not reproduced" if other or near[0] <= low <= high <= near[1] else "inconclusive"


def not_lower(measure: Mapping[str, Any] | None) -> str:
    """README's rule for what is claimed to cost nothing: no more than 2 points lower.

    >>> not_lower({"value": 0.0, "interval": [-0.01, 0.01]})
    'reproduced'
    """
    if not measure:
        return "not attempted"
    low, high = measure["interval"]
    return "reproduced" if low > -MARGIN else "not reproduced" if high < -MARGIN else "inconclusive"


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
)


def claims(kept: Mapping[str, Any]) -> str:
    """The ledger as Markdown: each claim, what was compared, effect, seeds, verdict by the rule."""
    found = arms(kept)
    per_nat = slope(found)

    def effect(before: str, after: str, name: str) -> tuple[dict[str, Any] | None, int]:
        known, seeds = change(found, before, after)
        if {"general", "kl_instruction"} <= set(known):
            known["equal_kl"] = known["general"] - per_nat * known["kl_instruction"]
        return (told(known[name]), seeds) if name in known else (None, 0)

    lines = [["claim", "compared", "effect", "seeds", "verdict"], ["---"] * 5]
    for claim, before, after, name, sign in CLAIMS:
        seen, seeds = effect(before, after, name)
        judged = verdict(seen, sign) if sign else not_lower(seen)
        if before == "dynamic" and judged == "reproduced":  # forgetting less by learning less?
            domain, _ = effect(before, after, "domain")
            judged = judged if domain and domain["value"] >= -MARGIN else "inconclusive"
        compared = f"{SHOWN.get(name, 'general, at equal KL')}: {after} − {before}"
        lines.append([claim, compared, report.change_cell(seen), str(seeds or ""), judged])
    for claim, compared, ratio in (
        ("capability-aware GRPO has less gradient variance", "noise to signal: full / grpo",
         noise_ratio(kept, "full")),
        ("the more so where entropy is high", "that ratio: high / low entropy",
         noise_by_entropy(kept, "full")),
    ):  # fmt: skip
        n = str(ratio["n"]) if ratio else ""
        lines.append([claim, compared, ratio_cell(ratio), n, verdict(ratio, -1, 1.0)])
    return markdown(lines)


BLOCKS = {"arms": table, "changes": changes, "claims": claims}


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
    p = argparse.ArgumentParser(prog="python -m bbkit.comparison", description=main.__doc__)
    p.add_argument("records", nargs="+", type=Path, metavar="RECORD", help="JSON of bbkit.study")
    p.add_argument("--write", type=Path, metavar="FILE", help="such as README.md")
    p.add_argument("--figures", type=Path, metavar="DIR", help="draw RECORD's figures there")
    args = p.parse_args(argv)
    return config.exit_code(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    try:
        text = args.write.read_text(encoding="utf-8") if args.write else ""
    except OSError as error:
        raise InputError(f"{args.write}: cannot read it ({error.strerror})") from error
    for path in args.records:
        kept = files.read_json(path)
        if not {"items", "runs"} <= set(kept):
            raise InputError(f"{path}: not a record; python -m bbkit.study --record writes one")
        text = filled(text, kept, path.stem)
        if args.figures:
            from bbkit import plots, studyplots

            made = {f"{path.stem}_{n}": draw(kept) for n, draw in studyplots.FIGURES.items()}
            plots.save(args.figures, made)
        elif not args.write:
            print("\n\n".join(make(kept) for make in BLOCKS.values()))
    if args.write:
        files.write_bytes(args.write, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
