"""Figures of a run, drawn from its folder alone, so that they can be drawn again.

Serves the paper's claims on capability, tax and balance: before and after with intervals, rewards,
weights, gradients and coefficients over the steps, domain against instruction following. One colour
per capability throughout (Okabe and Ito, safe for the colour-blind); captions say what to notice.
"""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bbkit.machine.files import read_json, read_rows, write_bytes
from bbkit.runs.looks import COLORS, looks, rewards_of
from bbkit.runs.looks import color as color  # the notebooks' name for it

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "domain": "domain accuracy",
    "domain_lenient": "domain accuracy, read leniently",
    "reasoning": "reasoning validity",
    "format": "format",
    "instruction": "instruction following",
    "instruction_unseen": "instruction following, unseen kinds",
    "unparsed": "no answer found",
}
STAGES = {"base": "base", "sft": "SFT", "grpo": "GRPO"}
BASELINES = {"guess_by_name": "guess by name", "majority": "majority", "chance": "chance"}
SHADES = {"base": 0.3, "sft": 0.6, "grpo": 1.0}
SHOWN = ("domain", "reasoning", "format", "instruction", "instruction_unseen")
Measures = Mapping[str, Mapping[str, Any]]


def rewards(folder: Path) -> "Figure | None":
    """Sampled rewards over GRPO's steps, and their weights below; None before any GRPO step."""
    rows = [r for r in read_rows(folder / "metrics.jsonl") if r["stage"] == "grpo"]
    names = rewards_of(folder)
    if not any(f"reward/{name}" in row for row in rows for name in names):
        return None
    figure, (top, below) = new_figure(7.2, 5.4, 2, sharex=True, height_ratios=[2.4, 1])
    window, trends, look = max(1, len(rows) // 10), [], looks(names)
    for i, name in enumerate(names):
        x, y = _series(rows, f"reward/{name}")
        if y:
            top.plot(x, y, **look[name], alpha=0.3, lw=0.8)
            mean = [fmean(y[max(0, j - window) : j]) for j in range(1, len(y) + 1)]
            top.plot(x, mean, **look[name], lw=2.2, label=name)
            trends.append(f"{name} {fmean(y[:window]):.2f} to {fmean(y[-window:]):.2f}")
        # equal weights stay visible, one inside the other
        thick = 2 + 6 * (1 - i / max(1, len(names) - 1))
        below.plot(*_series(rows, f"weight/{name}"), **look[name], lw=thick)
    top.set(ylabel="mean reward (0 to 1)", ylim=(-0.02, 1.02))
    below.margins(y=0.5)
    below.set(xlabel="GRPO step (optimiser updates)", ylabel="weight", ylim=(0, None))
    where = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    top.legend(**where, ncols=min(4, len(names)), frameon=False)
    span = "step" if window == 1 else f"{window} steps"
    return captioned(
        figure,
        "Rewards of the sampled training completions (thin: one step, thick: mean of the last "
        f"{span}) and the weight of each. Notice the trend from the first {span} to the "
        f"last: {'; '.join(trends)}. These are training prompts: held-out results stand apart.",
    )


def gradients(folder: Path) -> "Figure | None":
    """Cosines between the capabilities' gradients over GRPO's steps, coefficients below."""
    from bbkit.gradients import null_cosine

    rows = [r for r in read_rows(folder / "metrics.jsonl") if r["stage"] == "grpo"]
    pairs = sorted({k for r in rows for k in r if k.startswith("cosine/")})
    if not pairs:
        return None
    columns, look = (3 if len(pairs) < 10 else 4), looks(rewards_of(folder))
    high = 5.2 + 0.2 * math.ceil(len(pairs) / columns)
    figure, (top, below) = new_figure(7.2, high, 2, sharex=True, height_ratios=[2.4, 1])
    window, lines = max(1, len(rows) // 10), {}
    opposed = {pair: fmean(v < 0 for v in _series(rows, pair)[1]) for pair in pairs}
    shown = pairs if len(pairs) < 10 else sorted(pairs, key=lambda pair: -opposed[pair])[:6]
    for pair in pairs:
        _, one, other = pair.split("/")
        x, y = _series(rows, pair)
        mean = [fmean(y[max(0, j - window) : j]) for j in range(1, len(y) + 1)]
        style = {"lw": 2.4, "alpha": 1 if pair in shown else 0.25}
        (solid,) = top.plot(x, mean, color=look[one]["color"], **style)
        (dashed,) = top.plot(x, mean, color=look[other]["color"], ls=(0, (2, 2)), **style)
        lines[f"{one}, {other}"] = (solid, dashed)
    for name in look:
        below.plot(*_series(rows, f"coefficient/{name}"), **look[name], lw=2)
    most = "" if shown is pairs else " (strong: the six pairs that most often are)"
    named = (f"{' and '.join(pair.split('/')[1:])} {opposed[pair]:.0%}" for pair in shown)
    size = read_json(folder / "run.json").get("model", {}).get("lora_parameters")
    null = null_cosine(size) if size else 0.0
    by_chance = f"Random directions would give ±{null:.4f}. " if size else ""
    top.axhspan(-null, null, color="#555555", alpha=0.25)
    top.set(ylabel="cosine of the gradients", ylim=(-1.05, 1.05))
    below.set(xlabel="GRPO step (optimiser updates)", ylabel="coefficient")
    where = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": columns}
    top.legend(lines.values(), lines, frameon=False, fontsize=8, handlelength=3, **where)
    return captioned(
        figure,
        f"Cosine between the gradients of two capabilities in one step (mean of the last {window})"
        f" and the coefficient with which each enters the update. {by_chance}Notice how often two "
        f"are opposed{most}: {'; '.join(named)} of the steps.",
    )


def before_after(folder: Path) -> "Figure | None":
    """Held-out results of base, SFT and GRPO, each with its interval; None without evaluation."""
    results = results_of(folder)
    stages = [s for s in STAGES if s in results]
    look = looks(rewards_of(folder))
    own = [name for name in look if name not in COLORS]
    shown = [*SHOWN[:3], *own, *SHOWN[3:]]
    measures = [m for m in shown if any(m in results[s] for s in stages)]
    if not measures:
        return None
    figure, axis = new_figure(1.6 * len(measures) + 1, 4.6)
    width, ticks = 0.84 / len(stages), []
    for i, measure in enumerate(measures):
        tint = look[measure]["color"] if measure in look else color(measure)
        ticks.append(
            textwrap.fill(NAMES.get(measure, measure), 16) + f"\nn = {count_of(results, measure)}"
        )
        for stage in (s for s in stages if measure in results[s]):
            x = i + (stages.index(stage) - (len(stages) - 1) / 2) * width
            value, low, high = percent(results[stage][measure])
            style = {"alpha": SHADES[stage], "hatch": "//" if "unseen" in measure else None}
            axis.bar(x, value, width * 0.92, color=tint, ec="white", **style)
            ink = "#777777" if tint == "#000000" else "black"
            axis.errorbar(x, value, [[value - low], [high - value]], color=ink, capsize=3, lw=1)
            if measure == "domain" and "domain_lenient" in results[stage]:
                lenient = percent(results[stage]["domain_lenient"])[0]
                axis.plot(x, lenient, "D", mfc="white", mec="black", ms=6, zorder=5)
                high = lenient + 2 if -2 < lenient - high < 8 else high  # keep the number clear
            axis.text(x, high + 1.5, f"{value:.0f}", ha="center", fontsize=8)
            axis.text(x, -1.5, STAGES[stage], ha="center", va="top", fontsize=8)
        for name, line in zip(BASELINES, ("-", "--", ":"), strict=True):
            if measure == "domain" and name in results.get("baseline", {}):
                value = percent(results["baseline"][name])[0]
                style = {"color": "black", "lw": 1.2, "label": f"{BASELINES[name]} ({value:.0f})"}
                axis.plot([i - 0.46, i + 0.46], [value] * 2, line, **style)
    axis.set_xticks(range(len(measures)), ticks)
    axis.tick_params(axis="x", length=0, pad=14)
    axis.set(ylabel="held-out result (%)", ylim=(0, 108), yticks=range(0, 101, 20))
    axis.grid(visible=False, axis="x")
    if axis.get_legend_handles_labels()[0]:
        title = "domain accuracy without any model (%)"
        where = {"loc": "lower left", "bbox_to_anchor": (0, 1), "alignment": "left"}
        axis.legend(ncols=3, frameon=False, title=title, **where)
    return captioned(
        figure,
        "Held-out results before and after each stage, with 95 % intervals; diamonds: the same "
        "replies read leniently, whatever their form. Notice what SFT gains in domain and "
        "reasoning, what it costs in instruction following, and what of both GRPO leaves.",
    )


def front(folder: Path) -> "Figure | None":
    """Domain against instruction following: the tax as a distance; None before a second stage."""
    results = results_of(folder)
    stages = [s for s in STAGES if {"domain", "instruction"} <= set(results.get(s, ()))]
    if len(stages) < 2:
        return None
    figure, axis = new_figure(5.6, 5.2)
    places = []
    for stage in stages:
        marker = {"base": "o", "sft": "s", "grpo": "D"}[stage]
        (x, *xs), (y, *ys) = (percent(results[stage][m]) for m in ("instruction", "domain"))
        spread = {"xerr": [[x - xs[0]], [xs[1] - x]], "yerr": [[y - ys[0]], [ys[1] - y]]}
        axis.errorbar(x, y, **spread, color="#777777", capsize=3, lw=1)
        axis.plot(x, y, marker, color="black", ms=9, label=STAGES[stage])
        at = {"base": (9, 9), "sft": (-9, -17), "grpo": (-9, 9)}[stage]  # SFT and GRPO may be near
        side: dict[str, Any] = {"xytext": at, "ha": "left" if stage == "base" else "right"}
        axis.annotate(STAGES[stage], (x, y), textcoords="offset points", weight="bold", **side)
        places.append((x, y))
        if "domain_lenient" in results[stage]:
            y = percent(results[stage]["domain_lenient"])[0]
            axis.plot(x, y, marker, mfc="white", mec="black", ms=7, alpha=0.8)
    for start, end in pairwise(places):
        arrow = {"arrowstyle": "->", "color": "#777777", "shrinkA": 8, "shrinkB": 8}
        axis.annotate("", end, start, arrowprops=arrow)
    tax = ""
    if stages[0] == "base":
        axis.axvline(places[0][0], ls="--", lw=1, color=color("instruction"))
        paid = (f"{STAGES[s]} {places[0][0] - places[i][0]:.0f}" for i, s in enumerate(stages) if i)
        tax = f" ({', '.join(paid)} points)"
    axis.set(xlim=(0, 103), ylim=(-3, 103))
    axis.set_xlabel("instruction following, held out (%)", color=color("instruction"))
    axis.set_ylabel("domain accuracy, held out (%)", color=color("domain"))
    return captioned(
        figure,
        "Up is more knowledge used, right is more instructions followed; hollow: replies read "
        f"leniently. Notice the distance to the dashed line, which is the alignment tax{tax}, and "
        "whether GRPO moves back towards it without falling.",
    )


FIGURES: dict[str, Callable[[Path], "Figure | None"]] = {
    "before_after": before_after,
    "front": front,
    "rewards": rewards,
    "gradients": gradients,
}


def draw(folder: Path) -> dict[str, str]:
    """Write every figure that the run folder can give to figures/NAME.png; name -> caption."""
    return save(folder, {name: make(folder) for name, make in FIGURES.items()})


def save(folder: Path, figures: Mapping[str, "Figure | None"]) -> dict[str, str]:
    """Write figures/NAME.png of those that are there; name -> caption."""
    captions = {}
    for name, figure in figures.items():
        if figure is not None:
            (folder / "figures").mkdir(parents=True, exist_ok=True)
            image = io.BytesIO()
            figure.savefig(image, dpi=150)
            write_bytes(folder / "figures" / f"{name}.png", image.getvalue())
            captions[name] = figure.get_supxlabel().replace("\n", " ")
    return captions


def results_of(folder: Path) -> dict[str, Any]:
    """evaluation.json, or {}."""
    path = folder / "evaluation.json"
    return read_json(path) if path.exists() else {}


def percent(measure: Mapping[str, Any]) -> tuple[float, float, float]:
    """Value and interval in per cent; the interval always holds the value."""
    value = 100 * measure["value"]
    low, high = (100 * bound for bound in measure.get("interval") or [measure["value"]] * 2)
    return value, min(low, value), max(high, value)


def count_of(results: Mapping[str, Measures], name: str) -> str:
    """How many replies a measure is over, per stage where these differ: "194" or "194/190"."""
    ns = dict.fromkeys(results[s][name]["n"] for s in STAGES if name in results.get(s, {}))
    return "/".join(map(str, ns))


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def new_figure(width: float, height: float, *shape: int, **options: Any) -> tuple["Figure", Any]:
    """A figure of its own (no pyplot: no display, no global state) and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(*shape, **options)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return figure, axes


def captioned(figure: "Figure", text: str) -> "Figure":
    lines = textwrap.fill(text, int(figure.get_figwidth() * 15.5))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=8.5)
    return figure
