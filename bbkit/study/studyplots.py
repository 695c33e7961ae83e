"""The front of a recorded study: what its arms know, against what alignment cost them.

Serves the claims ledger: `python -m bbkit.study.comparison RECORD --figures DIR` draws it. One
colour of Okabe and Ito's an arm; bars are 95 % intervals over seeds and prompts. No tax means two
things at once: instructions of unseen kinds followed as by the base, and nothing lost elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bbkit.runs import statistics
from bbkit.runs.looks import color
from bbkit.runs.plots import captioned, new_figure, percent
from bbkit.study import effects, reasons, verdicts

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
        _mark(axis, scores, kind, ms=9, label=arm, zorder=5)
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


def _mark(axis: Axes, scores: effects.Draws, kind: Mapping[str, Any], **how: Any) -> None:
    """A mark where an arm's scores lie, with bars."""
    (x, *xs), (y, *ys) = (percent(effects.told(scores[m])) for m in ("general", "domain"))
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
    """Domain accuracy against general instruction following, a panel for each regime of a record.

    A filled mark is an arm whose worst kind of text elsewhere costs at most `verdicts.NATS` more
    than the base's; crosses are arms with fewer seeds than half of the most.
    """
    import numpy as np

    found, order = effects.arms(kept), list[str]()
    here = {name: reasons.arms(kept, name) for name in reasons.REGIMES[:3]}
    here = {name: some for name, some in here.items() if some}
    figure, axes = new_figure(
        0.6 + 4.1 * len(here), 5.6, 1, len(here), sharex=True, sharey=True, squeeze=False
    )
    base = next(iter(verdicts.values(found, "base").values()))
    whole = 100 * base["general"]
    for axis, (regime, arms) in zip(axes[0], here.items(), strict=True):
        axis.axvspan(whole - 100 * verdicts.MARGIN, whole, color="#009E73", alpha=0.12)
        axis.plot(whole, 100 * base["domain_lenient"], "o", color="#777777", ms=7, label="base")
        most = max(len(found[arm]) for arm in arms)
        for arm in arms:
            seen = list(verdicts.values(found, arm).values())
            way = arm.removeprefix("alone_").removeprefix("grpo_")
            if way not in order and len(seen) >= most / 2:
                order.append(way)
            at = [[100 * one[name] for one in seen] for name in ("general", "domain_lenient")]
            if len(seen) < most / 2:
                axis.plot(*(np.mean(some) for some in at), "x", color="#AAAAAA", ms=6)
                continue
            i = order.index(way)
            color_, mark = f"#{COLORS[i % len(COLORS)]}", MARKERS[i % len(MARKERS)]
            lost = np.mean([one.get("elsewhere", np.inf) for one in seen]) > verdicts.NATS
            _cross(axis, at, color_)
            axis.plot(
                *(np.mean(some) for some in at), mark, color=color_, ms=9, label=arm, zorder=5,
                mfc="white" if lost else color_, mew=1.6,
            )  # fmt: skip
        if any(len(found[arm]) < most / 2 for arm in arms):
            axis.plot([], [], "x", color="#AAAAAA", ms=6, label="arms of few seeds")
        axis.set_title(regime, fontsize=10)
        axis.set_xlabel("general instructions (%)", color=color("instruction"))
        axis.legend(
            fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2,
            columnspacing=1.2, handletextpad=0.2,
        )  # fmt: skip
    axes[0][0].set_ylabel("domain, read leniently (%)", color=color("domain"))
    return captioned(
        figure,
        "Up is more domain, right is less tax; lines, from six seeds on, are Student's 95 % "
        f"intervals. Green: within {100 * verdicts.MARGIN:.0f} points of the base. Filled marks "
        f"lose at most {verdicts.NATS:g} nat a token in the worst kind of text elsewhere; open "
        "ones lose more, or were not asked. No tax is filled, and in the green or right of it.",
    )


def _cross(axis: Axes, at: Sequence[Sequence[float]], shade: str) -> None:
    """Both intervals over seeds, where there are enough for them to be narrow."""
    told = [statistics.over_seeds(some) for some in at]
    if told[0]["n"] > 5:
        (x, left, right), (y, low, high) = ((t["value"], *t["interval"]) for t in told)
        axis.plot([left, right], [y, y], color=shade, lw=1.2, alpha=0.5)
        axis.plot([x, x], [low, high], color=shade, lw=1.2, alpha=0.5)
