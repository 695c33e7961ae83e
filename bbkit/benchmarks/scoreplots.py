"""Figures of public benchmarks: the front, accuracy by group.

Drawn from what `scorecard.results` gave; intervals always, captions say what to notice.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bbkit.runs import plots, statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"base": "#999999", "tuned": "#0072B2"}


def main_measure(place: str) -> str:
    """The measure by which models are compared at "task/protocol"."""
    return "prompt_strict" if place.startswith("ifeval") else "accuracy"


def front(found: Mapping[str, Any]) -> "Figure | None":
    """Domain against IFEval, with and without the adapter: what tuning gave and what it cost."""
    place = "ifeval/ifeval"
    domains = [p for p in found["base"] if p != place]
    if "tuned" not in found or place not in found["base"] or not domains:
        return None
    figure, axes = plots.new_figure(
        3.4 * len(domains) + 0.6, 4.3, 1, len(domains), squeeze=False, sharex=True
    )
    for axis, domain in zip(axes[0], domains, strict=True):
        points = []
        for model, color in MARKS.items():
            (x, *xs), (y, *ys) = (
                plots.percent(found[model][p][main_measure(p)]) for p in (place, domain)
            )
            spread = {"xerr": [[x - xs[0]], [xs[1] - x]], "yerr": [[y - ys[0]], [ys[1] - y]]}
            points.append((x, y))
            area = statistics.hypervolume(points) / 1e4
            label = f"{'with' if model == 'base' else 'and'} {model}: hypervolume {area:.3f}"
            axis.errorbar(x, y, **spread, fmt="o", color=color, capsize=3, lw=1, label=label)
        arrow = {"arrowstyle": "->", "color": "#777777", "shrinkA": 6, "shrinkB": 6}
        axis.annotate("", points[1], points[0], arrowprops=arrow)
        axis.set(title=domain.replace("/", ", "), xlim=(-2, 102), ylim=(-2, 102))
        axis.set_xlabel("IFEval, prompt strict (%)")
        axis.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("accuracy (%)")
    return plots.captioned(
        figure,
        "Up is more of the domain, right is more instructions followed. Notice where the arrow "
        "points: left is alignment tax. Hypervolume: the share of the square that is dominated.",
    )


def groups(found: Mapping[str, Any]) -> "Figure | None":
    """Accuracy by MMLU subject and strict verdicts by kind of instruction, each with interval."""
    import numpy as np

    models = [m for m in MARKS if m in found]
    places = [p for p in found[models[0]] if "groups" in found[models[0]][p]]
    if not places:
        return None
    counts = [len(found[models[0]][p]["groups"]) for p in places]
    figure, axes = plots.new_figure(
        7, 0.32 * sum(counts) * len(models) ** 0.5 + 1.2 * len(places), len(places), 1,
        squeeze=False, height_ratios=counts,
    )  # fmt: skip
    for axis, place in zip(axes[:, 0], places, strict=True):
        own = found[models[0]][place]["groups"]
        for m, model in enumerate(models):
            shown = [plots.percent(found[model][place]["groups"][name]) for name in own]
            x, low, high = np.transpose(shown)
            y = np.arange(len(own)) + (m - (len(models) - 1) / 2) * 0.3
            style = {"color": MARKS[model], "capsize": 3, "lw": 1, "label": model}
            axis.errorbar(x, y, xerr=[x - low, high - x], fmt="o", **style)
        names = [f"{n.replace('_', ' ')} (n = {g['n']})" for n, g in own.items()]
        axis.set_yticks(range(len(own)), names)
        axis.invert_yaxis()
        axis.set(xlim=(-2, 102))
        axis.set_title(place.replace("/", ", "), loc="left")
        if place.startswith("biomed_mmlu"):
            axis.axvline(25, ls=":", lw=1, color="black")
        if len(models) > 1:
            axis.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    axes[-1, 0].set_xlabel("right or followed (%)")
    return plots.captioned(
        figure,
        "Accuracy by subject (dotted: chance) and strict IFEval by kind of instruction, with 95 % "
        "intervals. Notice how wide they are: most subjects have fewer than 200 questions.",
    )
