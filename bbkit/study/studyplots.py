"""The front of a recorded study: what its arms know, against what alignment cost them.

Serves the claims ledger: `python -m bbkit.study.comparison RECORD --figures DIR` draws it. One
colour of Okabe and Ito's an arm; bars are 95 % intervals over seeds and prompts. No tax means two
things at once: instructions of unseen kinds followed as by the base, and nothing lost elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bbkit.runs.looks import color
from bbkit.runs.plots import captioned, new_figure, percent
from bbkit.study import effects

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
COLORS = "000000 0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 882255 44AA99 999933 777777".split()
MARKERS = "osD^vP*Xph<>d"  # as many pairs with COLORS as the product: no two ways look alike


def front(kept: Mapping[str, Any]) -> Figure:
    """Domain accuracy against general instruction following; each arm's hypervolume by `grpo`'s.

    Left the arms of STYLES with intervals, their seeds small; right all that share seeds with
    `grpo`, as changes.
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
    changes = _changes(right, found)
    return captioned(
        figure,
        "Left: every arm's last model; small marks are single seeds, dotted lines equal "
        "hypervolume (their product, %). Up and right is better. Right: hypervolume minus "
        f"grpo's on the same seeds, 95 % intervals over seeds and prompts; {changes}.",
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


def _changes(axis: Axes, found: Mapping[str, Any]) -> str:
    """A bar an arm: its hypervolume minus that of `grpo`; says how many are clear of 0."""
    names: list[str] = []
    above = below = 0
    for arm in found:
        known, seeds = effects.change(found, "grpo", arm)
        if arm == "grpo" or "hypervolume" not in known:
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
    axis.set(xlabel="hypervolume minus grpo's (points)")
    return f"clear of 0 are {above} above and {below} below, the number of seeds in brackets"


def tax_front(kept: Mapping[str, Any]) -> Figure:
    """Domain accuracy against general, and against the worst kind elsewhere, for both regimes.

    Of the arms that ran on all seeds of their regime.
    """
    figure, axes = new_figure(10.2, 8.8, 2, 2, sharey="row")
    order: list[str] = []
    for pair, regime in zip(axes, ("sft", "grpo"), strict=True):
        known = effects.scores(kept, regime)
        whole = 100 * known.pop("base")[0]["general"][0]
        most = max(seeds for _, seeds in known.values())
        for arm, (scores, seeds) in known.items():
            if seeds < most:
                continue
            way = arm.removeprefix("alone_")
            if way not in order:
                order.append(way)
            i = order.index(way)
            kind = {"color": f"#{COLORS[i % len(COLORS)]}", "marker": MARKERS[i % len(MARKERS)]}
            for axis, name in zip(pair, ("general", "elsewhere"), strict=True):
                _mark(axis, scores, (name, "domain_lenient"), kind, ms=8, label=arm)
        said, room = ("after SFT", 0.1) if regime == "sft" else ("after GRPO alone", 0.15)
        pair[0].axvspan(whole - 3, whole, color="#009E73", alpha=0.12)
        pair[1].axvspan(0, room, color="#009E73", alpha=0.12)
        pair[1].invert_xaxis()
        pair[0].set(title=f"{said}: what is asked", ylabel="domain, read leniently (%)")
        pair[0].set(xlabel="general: instructions of unseen kinds (%)")
        pair[1].set(title="what nobody asks", xlabel="elsewhere, worst kind: nats above the base")
        pair[1].legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return captioned(
        figure,
        "Up is more domain, right is less tax; lines are 95 % intervals over seeds and prompts. "
        "Green: within 3 points of the base, and within 0.1 nat (0.15 after GRPO) of it in the "
        "worst kind of text. Notice what replies to instructions alone protect: the left side, "
        "which is asked.",
    )
