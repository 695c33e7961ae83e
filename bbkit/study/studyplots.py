"""The front of a recorded study: what its arms know, against what alignment cost them.

Serves every claim: `python -m bbkit.study.comparison RECORD --figures DIR` draws it. No tax means
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = "000000 0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 882255 44AA99 999933 777777".split()
MARKERS = "osD^vP*Xph<>d"  # as many pairs with COLORS as the product: no two ways look alike


def front(kept: Mapping[str, Any]) -> Figure:
    """Domain accuracy against general instruction following, a panel for each regime of a record
    but those whose rewards conflict: brevity costs so much that its arms would set the scale.

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
                *(np.mean(some) for some in at), mark, color=color_, ms=9, label=arm,
                mfc="white" if lost else color_, mew=1.6, zorder=5 if lost else 6,
            )  # fmt: skip
        if any(len(found[arm]) < most / 2 for arm in arms):
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
