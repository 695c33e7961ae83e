"""What arms of a recorded study score, and by how much they differ, with intervals.

Serves every claim. An interval is over training seeds and over diseases or prompts at once
(pigeonhole bootstrap, Owen 2007, doi 10.1214/07-AOAS122): the recipe run again and asked other
questions. `general` is instruction following of kinds that no stage trains on, strict IFEval where
it was asked; `worse` the worse of it and domain accuracy, `hypervolume` the area that both span.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bbkit.runs import elsewhere, measures, statistics
from bbkit.study import recorded
from bbkit.study.recorded import Rows

NAMES = {
    "domain": "domain",
    "domain_lenient": "leniently",
    "reasoning": "reasoning",
    "instruction": "instructions",
    "general": "general",
    "elsewhere": "elsewhere (nats)",  # the worst kind of bbkit.runs.elsewhere
    "worse": "worse",
    "hypervolume": "hypervolume",
}
# Settings of GRPO under which gradients were probed; the noise of others is not known.
PROBED = {"judge": 0.0, "sigma_floor": 0.1, "metric": "euclidean"}
KL = {"kl": "KL, questions", "kl_instruction": "KL, instructions"}
Draws = dict[str, np.ndarray]  # of each measure: the value, then its bootstrap draws


def by_arm(kept: Mapping[str, Any], some: Collection[str] = ()) -> dict[str, dict[int, Rows]]:
    """Item rows by stage of every arm and seed of a record; `sft` is what the others began with.

    Or of `some` arms and `sft`: all of a long record take seconds.
    """
    found: dict[str, dict[int, Rows]] = {}
    known: dict[str, Rows] = getattr(kept, "rows", {})
    for name in kept["runs"]:
        arm, _, seed = name.rpartition("-")
        if some and arm not in some and arm != "sft":
            continue
        found.setdefault(arm, {})[int(seed)] = recorded.unpack(kept, name, known)
    return found


def last(rows: Rows) -> Sequence[Mapping]:
    """Item rows of an arm's final model."""
    return rows["grpo"] if "grpo" in rows else rows["sft"]


def scores(kept: Mapping[str, Any], regime: str = "") -> dict[str, tuple[Draws, int]]:
    """Every measure of each arm's last model with its draws, and the number of seeds; base first.

    `regime` "sft" or "grpo" asks for the arms without, or with, GRPO on domain questions alone.
    """
    found, known = {}, by_arm(kept)
    ends = {arm: [last(r) for r in seeds.values()] for arm, seeds in known.items()}
    for arm, rows in ({"base": [r["base"] for r in known["sft"].values()]} | ends).items():
        alone = arm.partition("_")[0] == "alone"
        if not regime or arm == "base" or alone == (regime == "grpo"):
            found[arm] = draws(rows), len(rows)
    return found


def draws(runs: Sequence[Sequence[Mapping]], count: int = 2000) -> Draws:
    """Every measure of one arm: its mean, and the means of `count` resamples of seeds and clusters.

    `runs` are the item rows of each seed. Two arms asked the same prompts over as many seeds draw
    the same seeds and clusters, so that their differences are paired.

    >>> row = {"id": "1", "task": "short", "entity": "e", "source": "s", "scores": {"domain": 0.5}}
    >>> draws([[row], [row]], 3)
    {'domain': array([0.5, 0.5, 0.5, 0.5])}
    """
    others = ("instruction", "elsewhere")  # the rest has domain accuracy, of each data set apart
    sources = sorted({row["source"] for row in runs[0] if row["task"] not in others})
    by_source = [f"{m} on {s}" for s in sources for m in ("domain", "domain_lenient")]
    asked = by_source if len(sources) > 1 else []
    found, cells = {}, [by_cluster(rows, apart=bool(asked)) for rows in runs]
    for name in (*measures.names(runs[0]), *KL, *asked, *elsewhere.names(runs[0])):
        if all(name in run for run in cells):
            table = np.array([[run[name][c] for c in cells[0][name]] for run in cells])
            found[name] = statistics.crossed(table, count)
    for measure, kinds in elsewhere.by_kind(found).items():
        if kinds:  # the worst kind, whichever it is in each draw
            found[measure] = np.max([found[name] for name in kinds.values()], axis=0)
    for name in ("instruction_unseen", "ifeval_strict"):
        if name in found:
            found["general"] = found[name]
    if {"domain", "general"} <= set(found):
        found["worse"] = np.minimum(found["domain"], found["general"])
        found["hypervolume"] = found["domain"] * found["general"]
    return found


def by_cluster(rows: Sequence[Mapping], apart: bool = False) -> dict[str, dict[str, list[float]]]:
    """Sum and count by cluster of each measure; `apart`: of domain accuracy by data set too.

    >>> row = {"id": "1", "task": "short", "entity": "e", "source": "s", "scores": {"domain": 0.5}}
    >>> by_cluster([row, row])
    {'domain': {'e': [1.0, 2]}}
    """
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        drawn, known = measures.cluster(row), dict(row["scores"])
        known["kl_instruction" if row["task"] == "instruction" else "kl"] = row.get("kl")
        if apart:
            domain = ("domain", "domain_lenient")
            known |= {f"{m} on {row['source']}": known[m] for m in domain if m in known}
        for name, value in known.items():
            if value is not None:
                cell = found.setdefault(name, {}).setdefault(drawn, [0.0, 0])
                cell[0] += value
                cell[1] += 1
    return found


def described(values: np.ndarray) -> dict[str, Any]:
    """The measure of a value followed by its draws: {"value", "interval"}."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "interval": [float(low), float(high)]}


def change(found: Mapping[str, Mapping[int, Rows]], before: str, after: str) -> tuple[Draws, int]:
    """Draws of arm `after` minus arm `before` over the seeds of both, and how many these are.

    `base` is the untrained model of either.
    """
    first = found.get("sft" if before == "base" else before, {})
    seeds = sorted(set(first) & set(found.get(after, {})))
    if not seeds:
        return {}, 0
    rows = [first[seed]["base"] if before == "base" else last(first[seed]) for seed in seeds]
    earlier, later = draws(rows), draws([last(found[after][s]) for s in seeds])
    return {k: later[k] - earlier[k] for k in later if k in earlier}, len(seeds)


def noise_ratio(kept: Mapping[str, Any], arm: str) -> dict[str, Any] | None:
    """Noise to signal of an arm's gradient over GRPO's at the same SFT, geometric mean over seeds.

    The intervals are those of the probes, joined; None where none shows a signal above the noise.
    """
    rows = [(row["ratio"], *row["interval"]) for row, _ in _probed(kept, arm)]
    if not rows:
        return None
    ratios, lows, highs = np.log(rows).T
    middle, half = ratios.mean(), np.linalg.norm((highs - lows) / 2) / len(rows)
    value, low, high = np.exp([middle, middle - half, middle + half]).tolist()
    return {"value": value, "interval": [low, high], "n": len(rows)}


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
    """Probe rows of an arm's scheme and of GRPO, of each seed that shows a signal.

    None of an arm with rewards, a floor or inner products of its own, which were not probed.
    """
    for name, run in kept["runs"].items():
        section = run["grpo"]
        if name.rpartition("-")[0] != arm or not section or not run["from"]:
            continue
        if any(section.get(key, usual) != usual for key, usual in PROBED.items()):
            continue
        combined = section["combination"]
        scheme = section["advantages"] + ("" if combined == "sum" else f" + {combined}")
        noise = kept["runs"][run["from"]]["noise"] or {}
        row = noise.get(scheme)
        if row and None not in (row["ratio"], *row["interval"]):
            yield row, noise["grpo"]
