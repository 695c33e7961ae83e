"""Figures of a recorded study: what its arms know, and what alignment cost them.

Serves every claim: `python -m bbkit.study.comparison RECORD --figures DIR` draws them. No tax means
two things at once: instructions of unseen kinds followed as by the base, and nothing lost
elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bbkit.runs import statistics
from bbkit.runs.looks import color
from bbkit.runs.plots import captioned, new_figure
from bbkit.study import effects, reasons, verdicts
from bbkit.study.arms import FROM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = "000000 0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 882255 44AA99 999933 777777".split()
MARKERS = "osD^vP*Xph<>d"  # as many pairs with COLORS as the product: no two ways look alike
STAGES = ("o", "#0072B2"), ("s", "#E69F00"), ("^", "#009E73")  # of the regimes of _regimes


def _regimes(kept: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, dict[str, list]]]:
    """The base's values, and of each regime and arm those of its seeds.

    Without those whose rewards conflict: brevity costs so much that they would set the scale.
    """
    found = effects.arms(kept)
    base = next(iter(verdicts.values(found, "base").values()))
    return base, {
        regime: {arm: list(verdicts.values(found, arm).values()) for arm in arms}
        for regime in reasons.REGIMES[: len(STAGES)]
        if (arms := reasons.arms(kept, regime))
    }


def drawn(kept: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure that a record has what it takes for, by its name."""
    stages = (stage for run in kept["runs"].values() for stage in run["scores"].values())
    known = all("elsewhere" in stage for stage in stages)
    return {"front": front(kept)} | ({"tax": tax(kept)} if known else {})


def front(kept: Mapping[str, Any]) -> Figure:
    """Domain accuracy against general instruction following, a panel for each regime of a record.

    A filled mark is an arm whose worst kind of text elsewhere costs at most `verdicts.NATS` more
    than the base's; crosses are arms with fewer seeds than half of the most.
    """
    import numpy as np

    (base, here), order = _regimes(kept), list[str]()
    figure, axes = new_figure(
        0.6 + 4.1 * len(here), 5.6, 1, len(here), sharex=True, sharey=True, squeeze=False
    )
    whole = 100 * base["general"]
    for axis, (regime, arms) in zip(axes[0], here.items(), strict=True):
        axis.axvspan(whole - 100 * verdicts.MARGIN, whole, color="#009E73", alpha=0.12)
        axis.plot(whole, 100 * base["domain_lenient"], "o", color="#777777", ms=7, label="base")
        most = max(map(len, arms.values()))
        for arm, seen in arms.items():
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
                *(np.mean(some) for some in at), mark, color=color_, ms=9, label=arm,
                mfc="white" if lost else color_, mew=1.6, zorder=5 if lost else 6,
            )  # fmt: skip
        if any(len(seen) < most / 2 for seen in arms.values()):
            axis.plot([], [], "x", color="#AAAAAA", ms=6, label="arms of few seeds")
        axis.set_title(regime, fontsize=10)
        axis.set_xlabel("general (%)", color=color("instruction"))
        axis.legend(
            fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2,
            columnspacing=1.2, handletextpad=0.2,
        )  # fmt: skip
    axes[0][0].set_ylabel("domain, read leniently (%)", color=color("domain"))
    return captioned(
        figure,
        "Up is more domain, right is less tax; lines are Student's 95 % intervals, crosses arms of "
        f"few seeds. Green: within {100 * verdicts.MARGIN:.0f} points of the base. Filled marks "
        f"lose at most {verdicts.NATS:g} nat a token in the worst kind of text elsewhere; open "
        "ones lose more, or were not asked. All by the mean: the tests of no tax are a table.",
    )


def _cross(axis: Axes, at: Sequence[Sequence[float]], shade: str) -> None:
    """Both intervals over seeds, where there are enough for them to be narrow."""
    told = [statistics.over_seeds(some) for some in at]
    if told[0]["n"] > 5:
        (x, left, right), (y, low, high) = ((t["value"], *t["interval"]) for t in told)
        axis.plot([left, right], [y, y], color=shade, lw=1.2, alpha=0.5)
        axis.plot([x, x], [low, high], color=shade, lw=1.2, alpha=0.5)


def tax(kept: Mapping[str, Any]) -> Figure:
    """What each arm lost: nats a token of the worst kind elsewhere, against points of `general`.

    Beside an arm's name is its domain accuracy, read leniently, in %; an arrow leads from an SFT to
    the GRPO that went on from it. Arms with fewer seeds than half of the most are left out.
    """
    import numpy as np
    from matplotlib.patches import Rectangle

    base, here = _regimes(kept)
    figure, axis = new_figure(8.7, 5.4)
    at, names = dict[str, tuple](), list[tuple]()
    for regime, arms in here.items():
        mark, shade = STAGES[reasons.REGIMES.index(regime)]
        look = {"marker": mark, "ms": 7, "color": shade, "mec": "black", "mew": 0.6, "ls": ""}
        axis.plot([], [], label=regime, **look)
        most = max(map(len, arms.values()))
        for arm, seen in arms.items():
            if len(seen) < most / 2:
                continue
            general, lost, domain = (
                np.mean([one[name] for one in seen])
                for name in ("general", "elsewhere", "domain_lenient")
            )
            at[arm] = 100 * (general - base["general"]), lost
            names.append((lost, f"{arm} ({100 * domain:.0f})", arm, shade))
            axis.plot(*at[arm], zorder=5, **look)
            if regime != reasons.REGIMES[0] and (before := FROM.get(arm, "sft")) in at:
                arrow = {"arrowstyle": "->", "color": "#BBBBBB", "lw": 0.8, "shrinkB": 5}
                axis.annotate("", at[arm], at[before], arrowprops=arrow)
    points = 100 * verdicts.MARGIN
    green = Rectangle((-points, 0), points, verdicts.NATS, color="#009E73", alpha=0.2)
    axis.add_patch(green)
    axis.set_xticks([x for x in axis.get_xticks() if x <= 0])
    top = 1.05 * max(lost for _, lost in at.values())
    axis.set(
        xlim=(min(x for x, _ in at.values()) - 1.5, 9), ylim=(0, top),
        xlabel="general, minus the base's (points)",
        ylabel="lost on the worst kind of other text (nats a token)",
    )  # fmt: skip
    names.sort()
    line = {"arrowstyle": "-", "lw": 0.4, "color": "#999999", "relpos": (0, 0.5)}
    heights = apart([lost for lost, *_ in names], top / max(28, len(names) + 1))
    for height, (_, name, arm, shade) in zip(heights, names, strict=True):
        axis.annotate(
            name, at[arm], (1.2, height), color=shade, fontsize=7.5, va="center", arrowprops=line
        )
    axis.legend(frameon=False, fontsize=8.5, loc="lower left")
    return captioned(
        figure,
        "Right is less tax by what the paper measures, down by what it does not; green: no tax, by "
        "the mean. In brackets: domain accuracy, %. Arrows lead from an SFT to the GRPO after it.",
    )


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights, `gap` apart or more and half of it above 0, near those wanted, which rise.

    >>> apart([0.0, 0.0, 3.0, 3.0], 1)
    [0.5, 1.5, 2.5, 3.5]
    """
    blocks: list[list[float]] = []  # what would overlap stands together, around its mean

    def first(some: list[float]) -> float:
        return max(gap / 2, sum(some) / len(some) - gap * (len(some) - 1) / 2)

    for height in wanted:
        blocks.append([height])
        while len(blocks) > 1 and first(blocks[-1]) < first(blocks[-2]) + gap * len(blocks[-2]):
            last = blocks.pop()
            blocks[-1] += last
    return [first(some) + gap * i for some in blocks for i in range(len(some))]
