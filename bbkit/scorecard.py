"""What public benchmarks gave: measures with intervals, paired tests, report.md and figures.

Serves the claims on BIOMED-MMLU, MedQA and IFEval. A figure stands with its protocol, the hash of
its prompts, n, interval, device and seconds, since each of them moves it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbkit import plots, statistics
from bbkit.files import write_bytes
from bbkit.report import cell, change_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWS = 2000  # resamples of the bootstrap
MARKS = {"base": "#999999", "tuned": "#0072B2"}
FOUR = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")


def main_measure(place: str) -> str:
    """The measure by which models are compared at "task/protocol"."""
    return "prompt_strict" if place.startswith("ifeval") else "accuracy"


def measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`{measure: {"value", "n", "interval"}}` over the item rows of one model, task and protocol.

    Groups (MMLU's subjects, IFEval's kinds) have theirs under "groups", calibration of
    log-likelihoods under "calibration"; "prompt" is the hash over all prompts.
    """
    ordered = sorted(rows, key=lambda row: row["id"])
    prompt = hashlib.sha256("".join(row["prompt"] for row in ordered).encode()).hexdigest()[:12]
    found: dict[str, Any] = {"prompt": prompt, "cut": sum(row.get("cut", False) for row in rows)}
    if known := [row["kl"] for row in rows if "kl" in row]:
        ids = [row["id"] for row in rows if "kl" in row]
        low, high = statistics.interval(known, ids, DRAWS, shares=False)
        found["kl"] = {"value": sum(known) / len(known), "n": len(known), "interval": [low, high]}
    if "prompt_strict" in rows[0]:
        for name in FOUR:
            found[name] = _verdicts(rows, name)
        found["answer_strict"] = _verdicts(rows, "answer_strict")
        kinds = defaultdict(list)
        for row in rows:
            for kind, kept in zip(row["kinds"], row["instruction_strict"], strict=True):
                kinds[kind.split(":")[0]].append((row["id"], float(kept)))
        return found | {"groups": {kind: _mean(pairs) for kind, pairs in sorted(kinds.items())}}
    found["accuracy"] = _mean([(row["id"], row["right"]) for row in rows])
    given = [row for row in rows if row["answer"] is not None]
    if "reply" in rows[0]:
        found["parsed"] = _mean([(row["id"], float(row["answer"] is not None)) for row in rows])
        if given:
            found["accuracy_parsed"] = _mean([(row["id"], row["right"]) for row in given])
    groups = defaultdict(list)
    for row in rows:
        groups[row["entity"]].append((row["id"], row["right"]))
    if 1 < len(groups) < len(rows):
        found["groups"] = {name: _mean(pairs) for name, pairs in sorted(groups.items())}
        found["macro"] = _macro(groups)
    if "confidence" in rows[0]:
        pairs = [(row["confidence"], bool(row["right"])) for row in rows]
        confidences, rights = zip(*pairs, strict=True)
        found["calibration"] = statistics.calibration(confidences, rights)
    return found


def _mean(pairs: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Of (prompt, value): a prompt's values go together, several instructions of it for example."""
    values = [value for _, value in pairs]
    low, high = statistics.interval(values, [prompt for prompt, _ in pairs], DRAWS)
    return {"value": sum(values) / len(values), "n": len(values), "interval": [low, high]}


def _verdicts(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    values = [(r["id"], r[name] if isinstance(r[name], list) else [r[name]]) for r in rows]
    return _mean([(prompt, float(kept)) for prompt, many in values for kept in many])


def _macro(groups: Mapping[str, Sequence[tuple[str, float]]]) -> dict[str, Any]:
    """The mean of the groups' means, with a bootstrap within each group (scipy, percentiles)."""
    import numpy as np
    from scipy.stats import bootstrap

    columns = [np.array([value for _, value in pairs]) for pairs in groups.values()]

    def mean_of_means(*samples, axis):
        return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)

    found = bootstrap(
        columns, mean_of_means, n_resamples=DRAWS, method="percentile", paired=False, rng=0
    ).confidence_interval
    value = statistics.macro((k, v) for k, pairs in groups.items() for _, v in pairs)
    bounds = [float(found.low), float(found.high)]
    return {"value": value, "n": sum(map(len, columns)), "interval": bounds}


def results(rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """`{model: {"task/protocol": measures}}`, and "difference" where there are two models.

    A difference is paired: bootstrap interval of tuned - base, McNemar's exact p, and p after Holm
    over all places, which are one family. `seconds` go by "model/task/protocol".
    """
    cells: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["model"]][f"{row['task']}/{row['protocol']}"].append(row)
    found: dict[str, Any] = {
        model: {
            place: measures(some) | {"seconds": seconds.get(f"{model}/{place}")}
            for place, some in places.items()
        }
        for model, places in cells.items()
    }
    if "tuned" in found:
        found["difference"] = {p: _paired(cells, p) for p in cells["base"]}
        adjusted = statistics.holm({p: d["p"] for p, d in found["difference"].items()})
        for place, p in adjusted.items():
            found["difference"][place]["p_holm"] = p
    return found


def _paired(cells: Mapping[str, Mapping[str, Sequence[Mapping]]], place: str) -> dict[str, Any]:
    name = "prompt_strict" if main_measure(place) == "prompt_strict" else "right"
    before = {row["id"]: row[name] for row in cells["base"][place]}
    after = {row["id"]: row[name] for row in cells["tuned"][place]}
    ids = sorted(before)
    changes = [after[i] - before[i] for i in ids]
    low, high = statistics.interval(changes, ids, DRAWS, shares=False)
    found = {"value": sum(changes) / len(changes), "n": len(changes), "interval": [low, high]}
    test = statistics.mcnemar([before[i] > 0 for i in ids], [after[i] > 0 for i in ids])
    return found | test


def line(label: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for the terminal on what was just measured."""
    found = measures(rows)
    name = "prompt_strict" if "prompt_strict" in found else "accuracy"
    parsed = f", parsed {cell(found['parsed'])}" if "parsed" in found else ""
    return f"{label}: {name} {cell(found[name])} %{parsed}, n {len(rows)}"


def write(folder: Path, found: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """report.md with its figures in figures/, written from what `results` gave."""
    settings, hardware = manifest["settings"], manifest["hardware"]
    device = ", ".join(hardware.get("gpu", [hardware.get("cpu", "CPU")]))
    parts = [f"# Benchmarks of {settings['model']['name']}", _table(found)]
    if "difference" in found:
        parts += ["## With the adapter against without", _differences(found["difference"])]
    figures = {"front": _front(found), "groups": _groups(found), "calibration": _calibration(found)}
    drawn = plots.save(folder, figures)
    parts += [f"![{caption}](figures/{name}.png)" for name, caption in drawn.items()]
    facts = {
        "device": device,
        "model": ", ".join(f"{k} {v}" for k, v in settings["model"].items()),
        "adapter": settings["adapter"] or "none",
        "new tokens per reply": settings["max_new_tokens"],
        "options": "as published"
        if settings["shuffle"] is None
        else f"shuffled by seed {settings['shuffle']}",
        "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
    }
    parts += ["## What ran", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
    parts += ["## Run it again", f"```\n{manifest['command']}\n```"]
    write_bytes(folder / "report.md", ("\n\n".join(parts) + "\n").encode(errors="replace"))


def _table(found: Mapping[str, Any]) -> str:
    lines = [
        "| model | task | protocol | accuracy or prompt strict (%) | macro | parsed | where parsed "
        "| n | prompts | seconds per 1,000 |",
        "|" + "---|" * 10,
    ]
    for model in MARKS:
        for place, some in found.get(model, {}).items():
            task, protocol = place.split("/")
            whole = some[main_measure(place)]
            rate = f"{1000 * some['seconds'] / whole['n']:,.0f}" if some["seconds"] else ""
            middle = [cell(some.get(name)) for name in ("macro", "parsed", "accuracy_parsed")]
            cells = [model, task, protocol, cell(whole), *middle, str(whole["n"])]
            lines.append("| " + " | ".join([*cells, f"`{some['prompt']}`", rate]) + " |")
            if task == "ifeval":
                names = (*FOUR[1:], "answer_strict")
                rest = ", ".join(f"{n.replace('_', ' ')} {cell(some[n])}" for n in names)
                lines.append(f"| | | | {rest} | | | | | | |")
    cut = {f"{m} {p}": s["cut"] for m in MARKS for p, s in found.get(m, {}).items() if s["cut"]}
    kls = {p: s["kl"] for p, s in found.get("tuned", {}).items() if "kl" in s}
    notes = "".join(
        f"\n\n{count} prompts of {place} did not fit the context and lost their beginning."
        for place, count in cut.items()
    ) + "".join(
        f"\n\nKL to the base along {row['n']} replies of {place}: {row['value']:.3f} "
        f"[{row['interval'][0]:.3f}, {row['interval'][1]:.3f}] nats per token."
        for place, row in kls.items()
    )
    reading = (
        "Brackets are 95 % intervals: Wilson's for shares, else bootstrap over prompts. What could "
        "not be read counts as wrong. `answer strict` reads a reply in the kit's grammar by its "
        "answer: the tags alone fail strict IFEval."
    )
    return "\n".join(lines) + f"\n\n{reading}{notes}"


def _differences(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| task | protocol | change (points) | gained | lost | McNemar p | after Holm |",
        "|" + "---|" * 7,
    ]
    for place, row in found.items():
        cells = [*place.split("/"), change_cell(row), str(row["gained"]), str(row["lost"])]
        cells += [f"{row['p']:.3g}", f"{row['p_holm']:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _front(found: Mapping[str, Any]) -> "Figure | None":
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
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    axes[0, 0].set_ylabel("accuracy (%)")
    return plots.captioned(
        figure,
        "Up is more of the domain, right is more instructions followed. Notice where the arrow "
        "points: left is alignment tax. Hypervolume: the share of the square that is dominated.",
    )


def _groups(found: Mapping[str, Any]) -> "Figure | None":
    """Accuracy by MMLU subject and strict verdicts by kind of instruction, each with interval."""
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
        groups = found[models[0]][place]["groups"]
        for m, model in enumerate(models):
            for i, name in enumerate(groups):
                value, low, high = plots.percent(found[model][place]["groups"][name])
                y = i + (m - (len(models) - 1) / 2) * 0.3
                spread = [[value - low], [high - value]]
                label = model if i == 0 and len(models) > 1 else None
                style = {"color": MARKS[model], "capsize": 3, "lw": 1, "label": label}
                axis.errorbar(value, y, xerr=spread, fmt="o", **style)
        names = [f"{n.replace('_', ' ')} (n = {g['n']})" for n, g in groups.items()]
        axis.set_yticks(range(len(groups)), names)
        axis.invert_yaxis()
        axis.set(xlim=(-2, 102), title=place.replace("/", ", "))
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


def _calibration(found: Mapping[str, Any]) -> "Figure | None":
    """How often the likeliest option is right, by how likely the model holds it."""
    models = [m for m in MARKS if m in found]
    places = [p for p in found[models[0]] if "calibration" in found[models[0]][p]]
    if not places:
        return None
    figure, axes = plots.new_figure(3.2 * len(places) + 0.6, 3.9, 1, len(places), squeeze=False)
    for axis, place in zip(axes[0], places, strict=True):
        axis.plot([0, 100], [0, 100], "--", color="black", lw=1)
        for model in models:
            some = found[model][place]["calibration"]
            for row in some["bins"]:
                low, high = statistics.wilson(round(row["accuracy"] * row["n"]), row["n"])
                x, y = 100 * row["confidence"], 100 * row["accuracy"]
                spread = [[y - 100 * low], [100 * high - y]]
                axis.errorbar(x, y, spread, fmt="o", color=MARKS[model], capsize=3, lw=1)
            label = f"{model}: error {100 * some['error']:.1f}"
            axis.plot([], [], "o", color=MARKS[model], label=label)
        axis.set(title=place.split("/")[0], xlim=(-2, 102), ylim=(-2, 102))
        axis.set_xlabel("confidence (%)")
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    axes[0, 0].set_ylabel("right (%)")
    return plots.captioned(
        figure,
        "Calibration of the log-likelihood protocol: points on the dashed line are as often right "
        "as the model is sure; below it the model is too sure. Error: expected calibration error.",
    )
