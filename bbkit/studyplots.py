"""Figures of a recorded study: the front, forgetting against distance, what training logged.

Serves the claims ledger: `python -m bbkit.comparison RECORD --figures DIR` draws them. One colour
of Okabe and Ito's an arm throughout; bars are 95 % intervals over seeds and prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bbkit import effects, statistics
from bbkit.plots import captioned, color, new_figure, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "base": {"color": "#777777", "marker": "o"},
    "sft": {"color": "#777777", "marker": "s"},
    "averaging": {"color": "#0072B2", "marker": "o"},
    "sft_retention": {"color": "#D55E00", "marker": "D"},
    "grpo": {"color": "#009E73", "marker": "s"},
    "gdpo": {"color": "#CC79A7", "marker": "^"},
    "static": {"color": "#E69F00", "marker": "v"},
    "dynamic": {"color": "#56B4E9", "marker": "P"},
    "full": {"color": "#000000", "marker": "*"},
}
OTHER = {"color": "#AAAAAA", "marker": "x"}  # more arms than a reader can tell apart by colours
LEVELS = (0.2, 0.4, 0.6)  # of the largest hypervolume shown, drawn as lines of equal product


def front(kept: Mapping[str, Any], first: str = "grpo") -> Figure:
    """Domain accuracy against general instruction following; each arm's hypervolume by `first`'s.

    Left the arms of STYLES with intervals, their seeds small; right all that share seeds with
    `first`, as changes.
    """
    import numpy as np

    found = effects.arms(kept)
    figure, (axis, right) = new_figure(9.6, 5.2, 1, 2, width_ratios=(3, 2))
    for arm, rows in effects.models(found).items():
        kind = STYLES.get(arm, OTHER)
        drawn = effects.draws(rows)
        (x, *xs), (y, *ys) = (percent(effects.told(drawn[m])) for m in ("general", "domain"))
        if arm not in STYLES:
            axis.plot(x, y, kind["marker"], color=kind["color"], ms=5, zorder=4)
            continue
        bars = {"xerr": [[x - xs[0]], [xs[1] - x]], "yerr": [[y - ys[0]], [ys[1] - y]]}
        axis.errorbar(x, y, **bars, color=kind["color"], alpha=0.45, lw=1, capsize=2)
        axis.plot(x, y, kind["marker"], color=kind["color"], ms=9, label=arm, zorder=5)
        for row in rows:
            one = effects.draws([row], 0)
            small = 100 * one["general"][0], 100 * one["domain"][0]
            axis.plot(*small, kind["marker"], color=kind["color"], ms=3.5, alpha=0.5)
    if set(found) - set(STYLES):
        axis.plot([], [], OTHER["marker"], color=OTHER["color"], ms=5, label="the others")
    low, end = axis.get_xlim()
    end, top = (100 if most > 40 else 1.2 * most for most in (end, axis.get_ylim()[1]))
    for level in LEVELS:
        product = level * end * top
        line = np.linspace(max(low, product / top), end, 50)
        axis.plot(line, product / line, ":", color="#999999", lw=1)
        axis.text(end, product / end, f" {product / 100:.2g}", va="center", fontsize=8)
    axis.set(xlim=(low, end), ylim=(-0.03 * top, top))
    axis.set_xlabel("general instruction following, held out (%)", color=color("instruction"))
    axis.set_ylabel("domain accuracy, held out (%)", color=color("domain"))
    axis.legend(
        ncols=4, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8.5,
        columnspacing=1.2, handletextpad=0.2,
    )  # fmt: skip
    changes = _changes(right, found, first)
    return captioned(
        figure,
        "Left: every arm's last model; small marks are single seeds, dotted lines equal "
        "hypervolume (their product, %). Up and right is better. Right: hypervolume minus "
        f"{first}'s on the same seeds, 95 % intervals over seeds and prompts; {changes}.",
    )


def _changes(axis: Axes, found: Mapping[str, Any], first: str) -> str:
    """A bar an arm: its hypervolume minus that of `first`; says how many are clear of 0."""
    names: list[str] = []
    above = below = 0
    for arm in found:
        known, seeds = effects.change(found, first, arm) if arm != first else ({}, 0)
        if "hypervolume" not in known:
            continue
        middle, low, high = percent(effects.told(known["hypervolume"]))
        kind, at = STYLES.get(arm, OTHER), -len(names)
        axis.plot([low, high], [at, at], color=kind["color"], lw=2)
        axis.plot(middle, at, kind["marker"], color=kind["color"], ms=7)
        names.append(f"{arm} ({seeds})")
        above += low > 0
        below += high < 0
    axis.axvline(0, color="#999999", lw=0.8)
    axis.set_yticks([-i for i in range(len(names))], names, fontsize=8)
    axis.set(xlabel=f"hypervolume minus {first}'s (points)")
    return f"clear of 0 are {above} above and {below} below, the number of seeds in brackets"


def forgetting(kept: Mapping[str, Any]) -> Figure | None:
    """General instruction following lost against KL to the base, a run a mark."""
    found = effects.arms(kept)
    per_nat, named = effects.slope(found), set()
    figure, axis = new_figure(7.2, 4.4)
    farthest = 0.0
    for arm, by_seed in found.items():
        for rows in by_seed.values():
            tuned, base = (effects.draws([r], 0) for r in (effects.last(rows), rows["base"]))
            if "kl_instruction" not in tuned or "general" not in tuned:
                return None
            x, kind = float(tuned["kl_instruction"][0]), STYLES.get(arm, OTHER)
            lost = 100 * float(base["general"][0] - tuned["general"][0])
            label = arm if arm in STYLES else "the others"
            name = {} if label in named else {"label": label}
            named.add(label)
            axis.plot(x, lost, kind["marker"], color=kind["color"], ms=7, **name)
            farthest = max(farthest, x)
    axis.plot([0, farthest], [0, -100 * per_nat * farthest], "--", color="#777777", lw=1)
    axis.axhline(0, color="#999999", lw=0.8)
    axis.set(xlabel="KL to the base on instructions (nats a token)", xlim=(0, None))
    axis.set(ylabel="general instruction following lost (points)")
    axis.legend(ncols=2, frameon=False, fontsize=8.5)
    return captioned(
        figure,
        "What each run forgot against how far it went from the base; the dashed line is the least "
        f"squares fit through 0, {-100 * per_nat:.0f} points a nat. Below the line less is "
        "forgotten than the distance lets expect.",
    )


def steps(kept: Mapping[str, Any], arms: tuple[str, ...] = ("grpo", "full")) -> Figure | None:
    """Rewards, weights and cosines of arms over GRPO's steps, means over seeds."""
    runs = {
        arm: [r for name, r in kept["runs"].items() if name.rpartition("-")[0] == arm and r["log"]]
        for arm in arms
    }
    if not all(runs.values()):
        return None
    figure, axes = new_figure(7.2, 5.6, 3, 1, sharex=True)
    for arm, line in zip(arms, ("--", "-"), strict=True):
        for axis, part in zip(axes, ("reward", "weight", "cosine"), strict=True):
            for key in sorted({k for r in runs[arm] for k in r["log"] if k.startswith(f"{part}/")}):
                pair = key.split("/")[1:]
                if part == "cosine" and pair != ["domain", "reasoning"] and pair[-1] != "format":
                    continue
                label = f"{arm}, {' and '.join(pair)}" if part != "cosine" or arm == "full" else ""
                _mean(
                    axis, [r["log"][key] for r in runs[arm] if key in r["log"]], pair, line, label
                )
    for axis, name in zip(axes, ("mean reward", "weight", "cosine of gradients"), strict=True):
        axis.set(ylabel=name)
    axes[0].legend(ncols=2, frameon=False, fontsize=7.5)
    axes[-1].axhline(0, color="#999999", lw=0.8)
    axes[-1].set(xlabel="GRPO step (optimiser updates)")
    return captioned(
        figure,
        "Training of plain GRPO (dashed) and of the whole method (solid), means over seeds and "
        "five steps; equal weights lie on one another, a cosine has the colours of its two "
        "rewards. Notice that the weights of the "
        "whole method move to what lags, and whether any pair of rewards is opposed for long.",
    )


def _mean(axis: Axes, series: list[list], pair: list[str], line: str, label: str) -> None:
    """The mean over runs, smoothed over five steps, in the colour of the (first) reward."""
    rows = [[v for v in column if v is not None] for column in zip(*series, strict=False)]
    known = [(i + 1, fmean(row)) for i, row in enumerate(rows) if row]
    smooth = [fmean(v for _, v in known[max(0, j - 5) : j]) for j in range(1, len(known) + 1)]
    x = [i for i, _ in known]
    axis.plot(x, smooth, line, color=color(pair[0]), lw=1.8, label=label or None)
    if len(pair) > 1:
        axis.plot(x, smooth, color=color(pair[1]), lw=1.8, ls=(0, (2, 2)))


SCHEMES = {"grpo": "grpo", "dr_grpo": "dr_grpo", "gdpo": "gdpo", "capability": "static"}


def noise(kept: Mapping[str, Any]) -> Figure | None:
    """Gradient noise over signal where entropy is low and high, by the scheme of the advantages."""
    probes = [run["noise"] for run in kept["runs"].values() if run["noise"]]
    figure, axis = new_figure(7.2, 3.8)
    seeds = 0
    for i, (scheme, arm) in enumerate(SCHEMES.items()):
        kind = STYLES.get(arm, {"color": "#D55E00", "marker": "D"})
        for at, half in enumerate(("low", "high")):
            seen = [p[scheme][half] for p in probes if p[scheme][half] and p[scheme][half] > 0]
            if len(seen) < 2:
                return None
            seeds = max(seeds, len(seen))
            x, found = at + 0.14 * (i - 1.5), statistics.over_seeds([math.log(v) for v in seen])
            y, (low, high) = math.exp(found["value"]), map(math.exp, found["interval"])
            axis.errorbar(x, y, [[y - low], [high - y]], color=kind["color"], lw=1, capsize=2)
            name = {} if at else {"label": scheme}
            axis.plot(x, y, kind["marker"], color=kind["color"], ms=8, **name)
            axis.plot([x] * len(seen), seen, kind["marker"], color=kind["color"], ms=3.5, alpha=0.5)
    axis.set(yscale="log", ylabel="noise over signal of one group's gradient")
    axis.set_xticks([0, 1], ["groups of low token entropy", "groups of high token entropy"])
    axis.legend(ncols=2, frameon=False, fontsize=8.5)
    return captioned(
        figure,
        f"Squared gradient noise over squared signal, geometric means of up to {seeds} seeds with "
        "Student's 95 % intervals; small marks are seeds. Notice that entropy matters more than "
        "the scheme.",
    )


FIGURES = {"front": front, "forgetting": forgetting, "steps": steps, "noise": noise}
