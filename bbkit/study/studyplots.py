"""Figures of a recorded study: what its arms know, and what alignment cost them.

Serves every claim: `python -m bbkit.study.comparison RECORD --figures DIR` draws them. No tax means
two things at once: instructions of unseen kinds followed as by the base, and nothing lost
elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bbkit.runs.plots import captioned, new_figure
from bbkit.study import effects, reasons, verdicts
from bbkit.study.arms import FROM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of each regime but those whose rewards conflict: brevity costs so much that they set the scale.
MARKS = (("o", "#0072B2"), ("s", "#E69F00"), ("^", "#009E73"))
GREEN = f"Green: by the mean within {100 * verdicts.MARGIN:.0f} points of the base"
ARROWS = "Arrows lead from an SFT to the GRPO after it."


def drawn(kept: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure that a record has what it takes for, by its name."""
    stages = (stage for run in kept["runs"].values() for stage in run["scores"].values())
    known = all("elsewhere" in stage for stage in stages)
    return {"front": front(kept)} | ({"tax": tax(kept)} if known else {})


def front(kept: Mapping[str, Any]) -> Figure:
    """Domain accuracy, read leniently, against `general`: what each arm knows, and what it lost."""
    figure = _arms(kept, "domain_lenient", "domain, read leniently (%)", 100)
    return captioned(figure, f"Up is more domain, right is less tax. {GREEN}. {ARROWS}")


def tax(kept: Mapping[str, Any]) -> Figure:
    """Nats a token lost on the worst kind of text elsewhere, against `general`.

    Beside an arm's name is its domain accuracy, read leniently, in %.
    """
    figure = _arms(kept, "elsewhere", "lost on the worst kind of other text (nats a token)")
    return captioned(
        figure,
        "Right is less tax by what the paper measures, down by what it does not. In brackets: "
        f"domain accuracy, %. {GREEN}, and {verdicts.NATS:g} nat. {ARROWS}",
    )


def _arms(kept: Mapping[str, Any], measure: str, label: str, scale: float = 1) -> Figure:
    """The mean of every arm with half as many seeds as the most of its regime, and its name."""
    from matplotlib.patches import Rectangle

    found = effects.by_arm(kept)
    base = next(iter(verdicts.values(found, "base").values()))
    figure, axis = new_figure(8.7, 5.4)
    at, names = {"base": (100 * base["general"], scale * base[measure])}, list[tuple]()
    axis.plot(*at["base"], "o", color="#777777", ms=7, label="base")
    for (mark, shade), regime in zip(MARKS, reasons.REGIMES, strict=False):
        arms = reasons.arms_of(kept, regime)
        look = {"marker": mark, "ms": 7, "color": shade, "mec": "black", "mew": 0.6, "ls": ""}
        if arms:
            axis.plot([], [], label=regime, **look)
        for arm in arms:
            if len(found[arm]) < max(len(found[other]) for other in arms) / 2:
                continue
            seen = list(verdicts.values(found, arm).values())
            general, height, domain = (
                fmean(one[name] for one in seen) for name in ("general", measure, "domain_lenient")
            )
            at[arm] = 100 * general, scale * height
            beside = f" ({100 * domain:.0f})" if measure != "domain_lenient" else ""
            names.append((scale * height, arm + beside, arm, shade))
            axis.plot(*at[arm], zorder=5, **look)
            if regime != reasons.REGIMES[0] and (before := FROM.get(arm, "sft")) in at:
                arrow = {"arrowstyle": "->", "color": "#BBBBBB", "lw": 0.8, "shrinkB": 5}
                axis.annotate("", at[arm], at[before], arrowprops=arrow)
    left, right = min(x for x, _ in at.values()), at["base"][0]
    low, high = min(y for _, y in at.values()), max(y for _, y in at.values())
    axis.set_xticks([x for x in axis.get_xticks() if x <= right])
    wide, tall, points = right - left, high - low, 100 * verdicts.MARGIN
    axis.set(
        xlim=(left - 0.1 * wide, right + 0.65 * wide), xlabel="general (%)", ylabel=label,
        ylim=(low - 0.05 * tall * (low > 0), high + 0.05 * tall),
    )  # fmt: skip
    bottom, top = axis.get_ylim()
    green = verdicts.NATS if measure == "elsewhere" else top - bottom
    axis.add_patch(Rectangle((right - points, bottom), points, green, color="#009E73", alpha=0.15))
    names.sort()
    line = {"arrowstyle": "-", "lw": 0.4, "color": "#999999", "relpos": (0, 0.5)}
    gap = (top - bottom) / max(28, len(names) + 1)
    heights = apart([y - bottom for y, *_ in names], gap, top - bottom)
    for height, (_, name, arm, shade) in zip(heights, names, strict=True):
        axis.annotate(
            name, at[arm], (right + 0.08 * wide, bottom + height), color=shade, fontsize=7.5,
            va="center", arrowprops=line,
        )  # fmt: skip
    axis.legend(frameon=False, fontsize=8.5, loc="lower left")
    return figure


def apart(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Heights, `gap` apart or more and half of it from 0 and `top`, near those wanted, which rise.

    >>> apart([0.0, 0.0, 3.0, 3.5], 1, 4)
    [0.5, 1.5, 2.5, 3.5]
    """
    blocks: list[list[float]] = []  # what would overlap stands together, around its mean

    def first(some: list[float]) -> float:
        tall = gap * (len(some) - 1)
        return max(gap / 2, min(sum(some) / len(some) - tall / 2, top - tall - gap / 2))

    for height in wanted:
        blocks.append([height])
        while len(blocks) > 1 and first(blocks[-1]) < first(blocks[-2]) + gap * len(blocks[-2]):
            last = blocks.pop()
            blocks[-1] += last
    return [first(some) + gap * i for some in blocks for i in range(len(some))]
