"""Figures and the report of a run, drawn from its folder alone, so that they can be drawn again.

Serves the paper's claims on capability, tax and balance: before and after with intervals, rewards
and weights over the steps, domain against instruction following. One colour per capability
throughout (Okabe and Ito, safe for the colour-blind); every caption says what to notice.
"""

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bbkit.files import read_json, read_rows, write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "domain": "#0072B2",
    "reasoning": "#D55E00",
    "format": "#CC79A7",
    "instruction": "#009E73",
    "retention": "#E69F00",
}
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


def color(name: str) -> str:
    """The colour of a capability or of a measure of it; grey for any other.

    >>> color("instruction_unseen") == color("instruction")
    True
    """
    return COLORS.get(name, COLORS.get(name.split("_")[0], "#555555"))


def rewards(folder: Path) -> "Figure | None":
    """Sampled rewards over GRPO's steps, and their weights below; None before any GRPO step."""
    rows = [r for r in read_rows(folder / "metrics.jsonl") if r["stage"] == "grpo"]
    names = [k.split("/")[1] for r in rows[:1] for k in r if k.startswith("reward/")]
    if not names:
        return None
    figure, (top, below) = _figure(7.2, 5.4, 2, sharex=True, height_ratios=[2.4, 1])
    window, trends = max(1, len(rows) // 10), []
    for i, name in enumerate(names):
        x, y = _series(rows, f"reward/{name}")
        if y:
            top.plot(x, y, color=color(name), alpha=0.3, lw=0.8)
            mean = [fmean(y[max(0, j - window) : j]) for j in range(1, len(y) + 1)]
            top.plot(x, mean, color=color(name), lw=2.2, label=name)
            trends.append(f"{name} {fmean(y[:window]):.2f} to {fmean(y[-window:]):.2f}")
        thick = 2 + 3 * (len(names) - 1 - i)  # equal weights stay visible, one inside the other
        below.plot(*_series(rows, f"weight/{name}"), color=color(name), lw=thick)
    top.set(ylabel="mean reward (0 to 1)", ylim=(-0.02, 1.02))
    below.margins(y=0.5)
    below.set(xlabel="GRPO step (optimiser updates)", ylabel="weight", ylim=(0, None))
    top.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=len(names), frameon=False)
    return _caption(
        figure,
        "Rewards of the sampled training completions (thin: one step, thick: mean of the last "
        f"{window}) and the weight of each. Notice the trend from the first {window} steps to the "
        f"last: {'; '.join(trends)}. These are training prompts: held-out results stand apart.",
    )


def before_after(folder: Path) -> "Figure | None":
    """Held-out results of base, SFT and GRPO, each with its interval; None without evaluation."""
    results = _results(folder)
    stages = [s for s in STAGES if s in results]
    measures = [m for m in SHOWN if any(m in results[s] for s in stages)]
    if not measures:
        return None
    figure, axis = _figure(1.6 * len(measures) + 1, 4.6)
    width, ticks = 0.84 / len(stages), []
    for i, measure in enumerate(measures):
        known = [s for s in stages if measure in results[s]]
        ticks.append(textwrap.fill(NAMES[measure], 16) + f"\nn = {_n(results, measure)}")
        for stage in known:
            x = i + (stages.index(stage) - (len(stages) - 1) / 2) * width
            value, low, high = _percent(results[stage][measure])
            style = {"alpha": SHADES[stage], "hatch": "//" if "unseen" in measure else None}
            axis.bar(x, value, width * 0.92, color=color(measure), ec="white", **style)
            axis.errorbar(x, value, [[value - low], [high - value]], color="black", capsize=3, lw=1)
            if measure == "domain" and "domain_lenient" in results[stage]:
                lenient = _percent(results[stage]["domain_lenient"])[0]
                axis.plot(x, lenient, "D", mfc="white", mec="black", ms=6, zorder=5)
                high = lenient + 2 if abs(lenient - high) < 5 else high  # keep the number clear
            axis.text(x, high + 1.5, f"{value:.0f}", ha="center", fontsize=8)
            axis.text(x, -1.5, STAGES[stage], ha="center", va="top", fontsize=8)
        for name, line in zip(BASELINES, ("-", "--", ":"), strict=True):
            if measure == "domain" and name in results.get("baseline", {}):
                value = _percent(results["baseline"][name])[0]
                label = f"{BASELINES[name]} ({value:.0f})"
                axis.plot(
                    [i - 0.46, i + 0.46], [value] * 2, line, color="black", lw=1.2, label=label
                )
    axis.set_xticks(range(len(measures)), ticks)
    axis.tick_params(axis="x", length=0, pad=14)
    axis.set(ylabel="held-out result (%)", ylim=(0, 108), yticks=range(0, 101, 20))
    axis.grid(visible=False, axis="x")
    if axis.get_legend_handles_labels()[0]:
        title = "domain accuracy without any model (%)"
        where = {"loc": "lower left", "bbox_to_anchor": (0, 1), "alignment": "left"}
        axis.legend(ncols=3, frameon=False, title=title, **where)
    return _caption(
        figure,
        "Held-out results before and after each stage, with 95 % intervals; diamonds: the same "
        "replies read leniently, whatever their form. Notice what SFT gains in domain and "
        "reasoning, what it costs in instruction following, and what of both GRPO leaves.",
    )


def front(folder: Path) -> "Figure | None":
    """Domain against instruction following: the tax as a distance; None before a second stage."""
    results = _results(folder)
    stages = [s for s in STAGES if {"domain", "instruction"} <= set(results.get(s, ()))]
    if len(stages) < 2:
        return None
    figure, axis = _figure(5.6, 5.2)
    places = []
    for stage, marker in zip(STAGES, "osD", strict=True):
        if stage not in stages:
            continue
        (x, *xs), (y, *ys) = (_percent(results[stage][m]) for m in ("instruction", "domain"))
        spread = {"xerr": [[x - xs[0]], [xs[1] - x]], "yerr": [[y - ys[0]], [ys[1] - y]]}
        axis.errorbar(x, y, **spread, color="#777777", capsize=3, lw=1)
        axis.plot(x, y, marker, color="black", ms=9, label=STAGES[stage])
        side = {"xytext": (9, 9)} if stage == "base" else {"ha": "right", "xytext": (-9, 9)}
        axis.annotate(STAGES[stage], (x, y), textcoords="offset points", weight="bold", **side)
        places.append((x, y))
        if "domain_lenient" in results[stage]:
            y = _percent(results[stage]["domain_lenient"])[0]
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
    return _caption(
        figure,
        "Up is more knowledge used, right is more instructions followed; hollow: replies read "
        f"leniently. Notice the distance to the dashed line, which is the alignment tax{tax}, and "
        "whether GRPO moves back towards it without falling.",
    )


FIGURES: dict[str, Callable[[Path], "Figure | None"]] = {
    "before_after": before_after,
    "front": front,
    "rewards": rewards,
}


def draw(folder: Path) -> dict[str, str]:
    """Write every figure that the run folder can give to figures/NAME.png; name -> caption."""
    captions = {}
    for name, make in FIGURES.items():
        if (figure := make(folder)) is not None:
            (folder / "figures").mkdir(exist_ok=True)
            image = io.BytesIO()
            figure.savefig(image, dpi=150)
            write_bytes(folder / "figures" / f"{name}.png", image.getvalue())
            captions[name] = figure.get_supxlabel().replace("\n", " ")
    return captions


def write_report(folder: Path) -> Path:
    """Draw the figures and write report.md, which a person reads first; works on unfinished runs.

    Reads run.json, metrics.jsonl, samples.jsonl and evaluation.json; gives the report's path.
    """
    manifest, results = read_json(folder / "run.json"), _results(folder)
    settings = manifest["settings"]
    parts = [f"# Run of {settings['model']['name']}", *_headline(results)]
    parts += [f"![{caption}](figures/{name}.png)" for name, caption in draw(folder).items()]
    parts += ["## Replies", *_replies(read_rows(folder / "samples.jsonl")), "## What ran"]
    parts += ["\n".join(f"- {name}: {value}" for name, value in _facts(manifest).items())]
    parts += ["## Run it again", f"```\n{manifest['command']}\n```"]
    write_bytes(folder / "report.md", ("\n\n".join(parts) + "\n").encode(errors="replace"))
    return folder / "report.md"


def _headline(results: Mapping[str, Measures]) -> list[str]:
    """The table of results, the baselines and the tax in words."""
    stages = [s for s in STAGES if s in results]
    if not stages:
        return ["Not evaluated yet."]
    steps = [(a, b) for a, b in (("base", "sft"), ("sft", "grpo")) if {a, b} <= set(stages)]
    names = [m for m in NAMES if any(m in results[s] for s in stages)]
    names += sorted({m for s in stages for m in results[s]} - set(names))
    head = ["measure (%)", "n", *(STAGES[s] for s in stages)]
    head += [f"{STAGES[b]} − {STAGES[a]} (points)" for a, b in steps]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        cells = [NAMES.get(name, name), _n(results, name)]
        cells += [_cell(results[s].get(name)) for s in stages]
        cells += [_change(results, a, b, name) for a, b in steps]
        lines.append("| " + " | ".join(cells) + " |")
    notes = ["Held-out prompts only; brackets are 95 % intervals, bold changes exclude 0."]
    known = [(BASELINES[k], v) for k, v in results.get("baseline", {}).items() if k in BASELINES]
    if known:
        notes.append(
            "Domain accuracy without any model: "
            + "; ".join(f"{k} {_cell(v)}" for k, v in known)
            + "."
        )
    for stage in stages[1:] if stages[0] == "base" else ():
        for name in ("instruction", "instruction_unseen"):
            if name in results["base"] and name in results[stage]:
                lost = _percent(results["base"][name])[0] - _percent(results[stage][name])[0]
                notes.append(
                    f"Alignment tax after {STAGES[stage]}, {NAMES[name]}: {lost:.1f} points."
                )
    return ["\n".join(lines), "\n".join(f"- {note}" for note in notes)]


def _change(results: Mapping[str, Any], a: str, b: str, name: str) -> str:
    """The change from stage a to b in points, with the paired interval where there is one."""
    paired = results.get("difference", {}).get(f"{b}-{a}", {}).get(name)
    if paired:
        value, low, high = _percent(paired)
        text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
        return f"**{text}**" if low > 0 or high < 0 else text
    if name in results[a] and name in results[b]:
        return f"{_percent(results[b][name])[0] - _percent(results[a][name])[0]:+.1f}"
    return ""


def _replies(rows: Sequence[Mapping[str, Any]], most: int = 3) -> list[str]:
    """The same held-out prompts through all stages; without these, the last training samples."""
    stages: dict[str, list] = {}
    for row in rows:
        if row.get("kind") == "held-out":
            stages.setdefault(row["prompt"], []).append(row)
    for row in [] if stages else rows[-most:]:
        stages.setdefault(row["prompt"], []).append(row)
    parts = []
    for prompt in sorted(stages, key=lambda p: -len(stages[p]))[:most]:
        gold = stages[prompt][0].get("gold")
        parts += ["**Prompt**", _fenced(prompt), *([f"gold: {gold}"] if gold else [])]
        for row in stages[prompt]:
            known = row["rewards"].items() if isinstance(row.get("rewards"), Mapping) else ()
            scores = ", ".join(f"{k} {v:g}" for k, v in known if v is not None)
            parts += [f"**{STAGES[row['stage']]}** ({scores})", _fenced(row["reply"])]
    return parts or ["No samples were written."]


def _fenced(text: str, most: int = 700) -> str:
    text = text if len(text) <= most else f"{text[:most]} … ({len(text)} characters)"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What ran, by name; run.json has all of it."""
    settings, hardware, git = manifest["settings"], manifest["hardware"], manifest["git"]
    model, sft, grpo = settings["model"], settings["sft"], settings["grpo"]
    minutes = {k: v["seconds"] / 60 for k, v in manifest["stages"].items() if "seconds" in v}
    cpu = f"{hardware.get('cpu', 'CPU')}, {hardware['cores']} cores"
    device = ", ".join(hardware.get("gpu", [cpu]))
    base = model["dtype"] if model["quantization"] == "none" else model["quantization"]
    groups = f"{grpo['prompts']} x {grpo['generations']} completions"
    return {
        "model": f"{model['name']} {model['revision']}",
        "adapter": f"LoRA rank {model['lora_rank']}; base in {base}",
        "data": "; ".join(f"{k} {', '.join(settings['data'][k])}" for k in ("sft", "grpo")),
        "SFT": f"{sft['steps']} steps of {sft['batch_size']}, rate {sft['learning_rate']:g}",
        "GRPO": f"{grpo['steps']} steps of {groups}, rate {grpo['learning_rate']:g}",
        "minutes": ", ".join(f"{k} {v:.1f}" for k, v in minutes.items()) or "not known",
        "device": f"{device}, {hardware.get('memory_gib', '?')} GiB memory, {hardware['system']}",
        "seed": str(settings["run"]["seed"]),
        "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
        "code": f"{git['commit'] or 'installed'}{', with local changes' if git['dirty'] else ''}",
        "time": f"{manifest['start']} to {manifest['end'] or 'now'}, status {manifest['status']}",
    }


def _results(folder: Path) -> dict[str, Any]:
    """evaluation.json, or {}; measures without a value are left out."""
    path = folder / "evaluation.json"
    stages = read_json(path) if path.exists() else {}
    return {
        stage: {k: v for k, v in measures.items() if v.get("value", 0) is not None}
        for stage, measures in stages.items()
    }


def _percent(measure: Mapping[str, Any]) -> tuple[float, float, float]:
    """Value and interval in per cent; the interval always holds the value."""
    value = 100 * measure["value"]
    low, high = (100 * bound for bound in measure.get("interval") or [measure["value"]] * 2)
    return value, min(low, value), max(high, value)


def _cell(measure: Mapping[str, Any] | None) -> str:
    if measure is None:
        return ""
    value, low, high = _percent(measure)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]" if measure.get("interval") else f"{value:.1f}"


def _n(results: Mapping[str, Measures], name: str) -> str:
    ns = dict.fromkeys(results[s][name]["n"] for s in STAGES if name in results.get(s, {}))
    return "/".join(map(str, ns))


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _figure(width: float, height: float, *shape: int, **options: Any) -> tuple["Figure", Any]:
    """A figure of its own (no pyplot: no display, no global state) and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(*shape, **options)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return figure, axes


def _caption(figure: "Figure", text: str) -> "Figure":
    lines = textwrap.fill(text, int(figure.get_figwidth() * 15.5))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=8.5)
    return figure
