"""Figures of a recorded study: fronts, what training logged, the knobs of retention.

Serves the claims ledger: `python -m bbkit.comparison RECORD --figures DIR` draws them. One colour
of Okabe and Ito's an arm; bars are 95 % intervals over seeds and prompts. No tax means two things
at once: instructions of unseen kinds followed as by the base, and nothing lost elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bbkit import effects
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
# A knob's arms are those whose names end in its value; beside it the value of the arm they change.
KNOBS = {"weight": ("penalty", 0.2), "budget": ("step", 0.01), "replies": ("penalty", 512)}
COLORS = "000000 0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 882255 44AA99 999933 777777".split()
MARKERS = "osD^vP*Xph<>d"  # as many pairs with COLORS as the product: no two ways look alike
ELSEWHERE = "elsewhere, worst kind: nats above the base"


def drawn(kept: Mapping[str, Any]) -> dict[str, Figure | None]:
    """The figures of a record by name; of the two regimes of tax where it holds their arms."""
    if "penalty" in effects.arms(kept):
        return {"front": tax_front(kept), "knobs": knobs(kept)}
    return {"front": front(kept), "steps": steps(kept)}


def front(kept: Mapping[str, Any], first: str = "grpo") -> Figure:
    """Domain accuracy against general instruction following; each arm's hypervolume by `first`'s.

    Left the arms of STYLES with intervals, their seeds small; right all that share seeds with
    `first`, as changes.
    """
    import numpy as np

    found = effects.arms(kept)
    figure, (axis, right) = new_figure(9.6, 5.2, 1, 2, width_ratios=(3, 2))
    for arm, rows in effects.models(found).items():
        scores, kind = effects.draws(rows), STYLES.get(arm, OTHER)
        if arm not in STYLES:
            at = (100 * scores[m][0] for m in ("general", "domain"))
            axis.plot(*at, kind["marker"], color=kind["color"], ms=5, zorder=4)
            continue
        _mark(axis, scores, ("general", "domain"), kind, ms=9, label=arm, zorder=5)
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


def _mark(
    axis: Axes, scores: effects.Draws, at: tuple[str, str], kind: Mapping[str, Any], **how: Any
) -> None:
    """A mark where an arm's scores lie on two measures, with bars; elsewhere is in nats, not %."""
    (x, *xs), (y, *ys) = (percent(effects.told(scores[m])) for m in at)
    if at[0] == "elsewhere":
        x, xs = x / 100, [bound / 100 for bound in xs]
    wide, high = [[x - xs[0]], [xs[1] - x]], [[y - ys[0]], [ys[1] - y]]
    axis.errorbar(x, y, high, wide, color=kind["color"], alpha=0.45, lw=1, capsize=2)
    axis.plot(x, y, ls="", **kind, **how)


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


def steps(kept: Mapping[str, Any]) -> Figure | None:
    """Rewards, weights and cosines of `grpo` and `full` over GRPO's steps, means over seeds."""
    figure, axes = new_figure(7.2, 5.6, 3, 1, sharex=True)
    parts = dict(zip(("reward", "weight", "cosine"), axes, strict=True))
    for arm, line in (("grpo", "--"), ("full", "-")):
        runs = [r for name, r in kept["runs"].items() if name.rpartition("-")[0] == arm]
        logs = [run["log"] for run in runs if run["log"]]
        if not logs:
            return None
        for key in sorted({key for log in logs for key in log}):
            part, *pair = key.split("/")
            if part not in parts or (part == "cosine" and "retention" in pair):
                continue
            columns = zip(*(log[key] for log in logs if key in log), strict=False)
            rows = [[v for v in column if v is not None] for column in columns]
            x = [i for i, row in enumerate(rows, 1) if row]
            y = [fmean(row) for row in rows if row]
            smooth = [fmean(y[max(0, j - 5) : j]) for j in range(1, len(y) + 1)]
            label = f"{arm}, {pair[0]}"
            parts[part].plot(x, smooth, line, color=color(pair[0]), lw=1.8, label=label)
            if len(pair) > 1:
                parts[part].plot(x, smooth, color=color(pair[1]), lw=1.8, ls=(0, (2, 2)))
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


def tax_front(kept: Mapping[str, Any]) -> Figure:
    """Domain accuracy against general, and against the worst kind elsewhere, for both regimes."""
    figure, axes = new_figure(10.2, 8.8, 2, 2, sharey="row")
    arms, order, joined = effects.arms(kept), list[str](), False
    for pair, regime in zip(axes, ("sft", "grpo"), strict=True):
        known = effects.scores(kept, regime)
        whole = 100 * known.pop("base")[0]["general"][0]
        most = max(seeds for _, seeds in known.values())
        for arm, (scores, seeds) in known.items():
            way = arm.removeprefix("alone_")
            if any(way.startswith(f"{base}_{knob}_") for knob, (base, _) in KNOBS.items()):
                continue
            if way not in order:
                order.append(way)
            i = order.index(way)
            kind = {"color": f"#{COLORS[i % len(COLORS)]}", "marker": MARKERS[i % len(MARKERS)]}
            label = arm if seeds == most else f"{arm} ({seeds} of {most} seeds)"
            for axis, name in zip(pair, ("general", "elsewhere"), strict=True):
                _mark(axis, scores, (name, "domain_lenient"), kind, ms=8, label=label)
        row = _varied(arms, "weight", "" if regime == "sft" else "alone_")
        joined = joined or bool(row)
        for axis, name, unit in zip(pair, ("general", "elsewhere"), (100, 1), strict=True):
            at = [unit * scores[name][0] for _, scores in row]
            high = [100 * scores["domain_lenient"][0] for _, scores in row]
            axis.plot(at, high, "-", color="#555555", lw=0.8, alpha=0.7)
            for x, y, (value, _) in zip(at, high, row, strict=True):
                axis.annotate(f"{value:g}", (x, y), (3, 3), textcoords="offset points", fontsize=7)
        said, room = ("after SFT", 0.1) if regime == "sft" else ("after GRPO alone", 0.15)
        pair[0].axvspan(whole - 3, whole, color="#009E73", alpha=0.12)
        pair[1].axvspan(0, room, color="#009E73", alpha=0.12)
        pair[1].invert_xaxis()
        pair[0].set(title=f"{said}: what is asked", ylabel="domain, read leniently (%)")
        pair[0].set(xlabel="general: instructions of unseen kinds (%)")
        pair[1].set(title="what nobody asks", xlabel=ELSEWHERE)
        pair[1].legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return captioned(
        figure,
        "Up is more domain, right is less tax; lines are 95 % intervals over seeds and prompts. "
        "Green: within 3 points of the base, and within 0.1 nat (0.15 after GRPO) of it in the "
        "worst kind of text. "
        + "Joined, with numbers: other weights of the penalty, fewer seeds. " * joined
        + "Notice what replies to instructions alone protect: the left side, which is asked.",
    )


def _varied(
    found: Mapping[str, Any], knob: str, before: str = ""
) -> list[tuple[float, effects.Draws]]:
    """The values of a knob with what they score, over the seeds that all values have."""
    way, usual = KNOBS[knob]
    start = f"{before}{way}_{knob}_"
    names = {float(name.removeprefix(start)): name for name in found if name.startswith(start)}
    if not names:
        return []
    names[usual] = f"{before}{way}"
    seeds = sorted(set.intersection(*(set(found.get(name, {})) for name in names.values())))
    if not seeds:
        return []
    rows = {value: [effects.last(found[name][s]) for s in seeds] for value, name in names.items()}
    return [(value, effects.draws(rows[value], 0)) for value in sorted(rows)]


def knobs(kept: Mapping[str, Any]) -> Figure | None:
    """General, the worst kind elsewhere and lenient domain over each knob of retention."""
    found = effects.arms(kept)
    points = {knob: row for knob in KNOBS if (row := _varied(found, knob))}
    if not points:
        return None
    general = 100 * effects.scores(kept, "sft")["base"][0]["general"][0]
    figure, axes = new_figure(9.6, 6.0, 2, len(points), sharex="col", sharey="row", squeeze=False)
    for (above, below), (knob, row) in zip(axes.T, points.items(), strict=True):
        at = [value for value, _ in row]
        for axis, name, style, shade, label, unit in (
            (above, "general", "o-", "instruction", "general", 100),
            (above, "domain_lenient", "o-", "domain", "domain, leniently", 100),
            (below, "elsewhere", "o-", "retention", "elsewhere", 1),
            (below, "elsewhere_kl", "s--", "retention", "elsewhere, KL", 1),
        ):
            y = [unit * scores[name][0] for _, scores in row]
            axis.plot(at, y, style, color=color(shade), label=label)
        above.axhline(general, color=color("instruction"), ls=":", lw=1)
        below.axhline(0.1, color="#999999", ls=":", lw=1)
        below.set(xscale="log", xlabel=f"retention.{knob}")
        below.set_xticks(at, [f"{value:g}" for value in at])
        below.set_xticks([], minor=True)
    axes[0, 0].set(ylabel="held out (%)")
    axes[1, 0].set(ylabel="worst kind (nats a token)", ylim=(0, None))
    for axis in axes[:, 0]:
        axis.legend(fontsize=8, frameon=False)
    return captioned(
        figure,
        "SFT with one knob of the arms penalty (weight 0.2) or step changed at a time. Dotted: the "
        "base's general, and 0.1 nat a token. Notice how wide the plateau of each knob is.",
    )
