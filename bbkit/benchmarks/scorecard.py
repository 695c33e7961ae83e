"""What public benchmarks gave: measures with intervals, paired tests, report.md and figures.

Serves the claims on BIOMED-MMLU, MedQA and IFEval. A figure stands with its protocol, the hash of
its prompts, n, interval, device and seconds, since each of them moves it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bbkit.benchmarks.scoreplots import MARKS, front, groups, main_measure
from bbkit.machine.files import write_bytes
from bbkit.runs import plots, statistics
from bbkit.runs.measures import mean
from bbkit.runs.report import cell, change_cell, markdown, nats

DRAWS = 2000  # resamples of the bootstrap
FOUR = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
# Of (value, prompt): a prompt's values go together, several instructions of it for example.
_mean = partial(mean, draws=DRAWS, shares=True)


def measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`{measure: {"value", "n", "interval"}}` over the item rows of one model, task and protocol.

    Groups (MMLU's subjects, IFEval's kinds) have theirs under "groups"; "prompt" is the hash over
    all prompts.
    """
    ordered = sorted(rows, key=lambda row: row["id"])
    prompt = hashlib.sha256("".join(row["prompt"] for row in ordered).encode()).hexdigest()[:12]
    found: dict[str, Any] = {"prompt": prompt, "cut": sum(row.get("cut", False) for row in rows)}
    if known := [(row["kl"], row["id"]) for row in rows if "kl" in row]:
        found["kl"] = _mean(known, shares=False)
    parts: dict[str, list[tuple[float, str]]] = defaultdict(list)
    if "prompt_strict" in rows[0]:
        for name in (*FOUR, "answer_strict"):  # some have a verdict for each instruction
            kept = [(float(v), r["id"]) for r in rows for v in np.atleast_1d(r[name])]
            found[name] = _mean(kept)
        for row in rows:
            for kind, held in zip(row["kinds"], row["instruction_strict"], strict=True):
                parts[kind.split(":")[0]].append((float(held), row["id"]))
        return found | {"groups": {kind: _mean(pairs) for kind, pairs in sorted(parts.items())}}
    found["accuracy"] = _mean([(row["right"], row["id"]) for row in rows])
    given = [row for row in rows if row["answer"] is not None]
    if "reply" in rows[0]:
        found["parsed"] = _mean([(float(row["answer"] is not None), row["id"]) for row in rows])
        if given:
            found["accuracy_parsed"] = _mean([(row["right"], row["id"]) for row in given])
    for row in rows:
        parts[row["entity"]].append((row["right"], row["id"]))
    if 1 < len(parts) < len(rows):
        found["groups"] = {name: _mean(pairs) for name, pairs in sorted(parts.items())}
        found["macro"] = _macro(parts)
    return found


def _macro(groups: Mapping[str, Sequence[tuple[float, str]]]) -> dict[str, Any]:
    """The mean of the groups' means, with a bootstrap within each group (scipy, percentiles)."""
    from scipy.stats import bootstrap

    columns = [np.array([value for value, _ in pairs]) for pairs in groups.values()]

    def mean_of_means(*samples, axis):
        return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)

    found = bootstrap(
        columns, mean_of_means, n_resamples=DRAWS, method="percentile", paired=False, rng=0
    ).confidence_interval
    value, bounds = mean_of_means(*columns, axis=0), [float(found.low), float(found.high)]
    return {"value": float(value), "n": sum(map(len, columns)), "interval": bounds}


def results(rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """`{model: {"task/protocol": measures}}`, and "difference" where there are two models.

    A difference is paired: bootstrap interval of tuned - base, McNemar's exact p, and p after Holm
    over all places, which are one family. `seconds` go by "model/task/protocol".
    """
    cells: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["model"]][f"{row['task']}/{row['protocol']}"].append(row)
    found: dict[str, Any] = {model: {} for model in cells}
    for model, places in cells.items():
        for place, some in places.items():
            found[model][place] = measures(some) | {"seconds": seconds.get(f"{model}/{place}")}
    if "tuned" in found:
        found["difference"] = {p: _paired(cells, p) for p in cells["base"]}
        adjusted = statistics.holm({p: d["p"] for p, d in found["difference"].items()})
        for place, p in adjusted.items():
            found["difference"][place]["p_holm"] = p
    return found


def _paired(cells: Mapping[str, Mapping[str, Sequence[Mapping]]], place: str) -> dict[str, Any]:
    name = main_measure(place).replace("accuracy", "right")
    before, after = ({row["id"]: row[name] for row in cells[m][place]} for m in ("base", "tuned"))
    ids = sorted(before)
    found = _mean([(after[i] - before[i], i) for i in ids], shares=False)
    return found | statistics.mcnemar([before[i] > 0 for i in ids], [after[i] > 0 for i in ids])


def line(label: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for the terminal on what was just measured."""
    found, name = measures(rows), main_measure(label.partition("/")[2])
    parsed = f", parsed {cell(found['parsed'])}" if "parsed" in found else ""
    return f"{label}: {name} {cell(found[name])} %{parsed}, n {len(rows)}"


def write(folder: Path, found: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """report.md with its figures in figures/, written from what `results` gave."""
    settings, hardware = manifest["settings"], manifest["hardware"]
    shuffle = settings["shuffle"]
    parts = [f"# Benchmarks of {settings['model']['name']}", _table(found)]
    if "difference" in found:
        parts += ["## With the adapter against without", _differences(found["difference"])]
    figures = {draw.__name__: draw(found) for draw in (front, groups)}
    drawn = plots.save(folder, figures)
    parts += [f"![{caption}](figures/{name}.png)" for name, caption in drawn.items()]
    facts = {
        "device": ", ".join(hardware.get("gpu", [hardware.get("cpu", "CPU")])),
        "model": ", ".join(f"{k} {v}" for k, v in settings["model"].items()),
        "adapter": settings["adapter"] or "none",
        "new tokens per reply": settings["max_new_tokens"],
        "options": "as published" if shuffle is None else f"shuffled by seed {shuffle}",
        "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
    }
    parts += ["## What ran", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
    parts += ["## Run it again", f"```\n{manifest['command']}\n```"]
    write_bytes(folder / "report.md", ("\n\n".join(parts) + "\n").encode(errors="replace"))


def _table(found: Mapping[str, Any]) -> str:
    head = ["model", "task", "protocol", "accuracy or prompt strict (%)", "macro", "parsed"]
    head += ["where parsed", "n", "prompts", "seconds per 1,000"]
    lines = []
    for model in MARKS:
        for place, some in found.get(model, {}).items():
            task, protocol = place.split("/")
            whole = some[main_measure(place)]
            rate = f"{1000 * some['seconds'] / whole['n']:,.0f}" if some["seconds"] else ""
            middle = [cell(some.get(name)) for name in ("macro", "parsed", "accuracy_parsed")]
            cells = [model, task, protocol, cell(whole), *middle, str(whole["n"])]
            lines.append([*cells, f"`{some['prompt']}`", rate])
            if task == "ifeval":
                names = (*FOUR[1:], "answer_strict")
                rest = ", ".join(f"{n.replace('_', ' ')} {cell(some[n])}" for n in names)
                lines.append(["", "", "", rest, *[""] * 6])
    notes = [
        f"{some['cut']} prompts of {m} {place} did not fit the context and lost their beginning."
        for m in MARKS for place, some in found.get(m, {}).items() if some["cut"]
    ] + [
        f"KL to the base along {some['kl']['n']} replies of {place}: {nats(some['kl'])} nats per "
        "token."
        for place, some in found.get("tuned", {}).items() if "kl" in some
    ]  # fmt: skip
    reading = (
        "Brackets are 95 % intervals: Wilson's for shares, else bootstrap over prompts. What could "
        "not be read counts as wrong. `answer strict` reads a reply in the kit's grammar by its "
        "answer: the tags alone fail strict IFEval."
    )
    return "\n\n".join([markdown(head, lines), reading, *notes])


def _differences(found: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["task", "protocol", "change (points)", "gained", "lost", "McNemar p", "after Holm"]
    lines = []
    for place, row in found.items():
        cells = [*place.split("/"), change_cell(row), str(row["gained"]), str(row["lost"])]
        lines.append([*cells, f"{row['p']:.3g}", f"{row['p_holm']:.3g}"])
    return markdown(head, lines)
