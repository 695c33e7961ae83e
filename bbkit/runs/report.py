"""The report of a run, report.md in its folder, which a person reads first.

Written from the folder alone, so that it can be written again, on an unfinished run too.
`python -m bbkit.runs.report RUN [RUN ...]` does that, and prints the results of several runs, seeds
of one set-up, as one table.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bbkit import InputError, config, exit_code
from bbkit.machine import functions
from bbkit.machine.files import read_json, read_rows, write_bytes
from bbkit.runs import elsewhere, health, measures, record
from bbkit.runs.plots import BASELINES, NAMES, STAGES, Measures, count_of, draw, percent, results_of


def write(folder: Path) -> Path:
    """Draw the figures and write report.md; works on unfinished runs.

    Reads run.json, metrics.jsonl, samples.jsonl and evaluation.json; gives the report's path.
    Raises InputError where they are not those of a run.
    """
    try:
        text = "\n\n".join(_parts(folder)) + "\n"
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"its files are not those of a run of this kit ({type(error).__name__}: {error})"
        raise InputError(f"{folder}: {said}") from error
    write_bytes(folder / "report.md", text.encode(errors="replace"))
    return folder / "report.md"


def _parts(folder: Path) -> list[str]:
    manifest, logged = read_json(folder / "run.json"), read_rows(folder / "metrics.jsonl")
    settings = manifest["settings"]
    parts = [f"# Run of {settings['model']['name']}", *headline(results_of(folder))]
    parts += [f"![{caption}](figures/{name}.png)" for name, caption in draw(folder).items()]
    parts += _retention(settings.get("retention", {}), logged)
    parts += ["## Health", _bullets(health.over(logged)) or "Nothing was noticed."]
    parts += ["## Replies", *_replies(read_rows(folder / "samples.jsonl"))]
    known = facts(manifest).items()
    parts += ["## What ran", _bullets(f"{name}: {value}" for name, value in known)]
    return [*parts, "## Run it again", f"```\n{manifest['command']}\n```"]


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def headline(results: Mapping[str, Measures]) -> list[str]:
    """The table of results, the baselines and the tax in words, and the table of elsewhere."""
    stages = [s for s in STAGES if s in results]
    if not stages:
        return ["Not evaluated yet."]
    steps = [(a, b) for a, b in (("base", "sft"), ("sft", "grpo")) if {a, b} <= set(stages)]
    measured = {m for s in stages for m in results[s] if not m.startswith("elsewhere")}
    names = [m for m in NAMES if m in measured] + sorted(measured - set(NAMES))
    head = ["measure (%)", "n", *(STAGES[s] for s in stages)]
    head += [f"{STAGES[b]} − {STAGES[a]} (points)" for a, b in steps]
    changed = [results.get("difference", {}).get(f"{b}-{a}", {}) for a, b in steps]
    lines = []
    for name in names:
        cells = [NAMES.get(name, name), count_of(results, name)]
        cells += [cell(results[s].get(name)) for s in stages]
        lines.append([*cells, *(change_cell(paired.get(name)) for paired in changed)])
    notes = ["Held-out prompts only; brackets are 95 % intervals, bold changes exclude 0."]
    baselines = results.get("baseline", {})
    if known := [f"{BASELINES[k]} {cell(v)}" for k, v in baselines.items() if k in BASELINES]:
        notes.append(f"Domain accuracy without any model: {'; '.join(known)}.")
    for name, told in results.get("kl", {}).items():
        stage, _, axis = name.partition("_")
        where = f"after {STAGES[stage]}, {axis or 'question'} replies"
        notes.append(f"KL to the base {where}: {nats(told)} nats per token.")
    base = results.get("base", {})
    for stage in stages:
        for name in ("instruction", "instruction_unseen"):
            if stage != "base" and name in base and name in results[stage]:
                lost = percent(base[name])[0] - percent(results[stage][name])[0]
                where = f"after {STAGES[stage]}, {NAMES[name]}"
                notes.append(f"Alignment tax {where}: {lost:.1f} points.")
    return [markdown(head, lines), _bullets(notes), *_elsewhere(results, stages)]


def _elsewhere(results: Mapping[str, Any], stages: Sequence[str]) -> list[str]:
    """The loss on text that nothing looks at, by kind, and what it says; [] where not measured."""
    stages = [s for s in stages if s != "base" and "elsewhere" in results[s]]
    if not stages:
        return []
    told = {s: elsewhere.by_kind(results[s]) for s in stages}
    columns = [(s, measure) for s in stages for measure in elsewhere.WORST]
    marks = {"elsewhere": "loss", "elsewhere_kl": "KL(base ‖ model)"}
    head = ["text", "n", *(f"{STAGES[s]}: {marks[measure]}" for s, measure in columns)]
    lines = []
    for kind, name in told[stages[0]]["elsewhere"].items():
        cells = [nats(results[s].get(told[s][measure].get(kind))) for s, measure in columns]
        lines.append([kind, count_of(results, name), *cells])
    cells = [f"{results[s][m]['kind']} {nats(results[s][m])}" for s, m in columns]
    lines.append(["**worst**", "", *cells])
    worst = results[stages[-1]]["elsewhere"]
    note = (
        f"Texts that no reward looks at, and no reply of retention. After {STAGES[stages[-1]]} the "
        f"worst kind, {worst['kind']}, costs {worst['value']:.3f} nats a token more than the base, "
        f"{math.exp(worst['value']):.2f} times its perplexity. *No tax* means both: instructions "
        "followed as by the base, and nothing lost here."
    )
    return ["**Elsewhere: loss above the base's, nats a token**", markdown(head, lines), note]


def _retention(settings: Mapping[str, Any], logged: Sequence[Mapping]) -> list[str]:
    """What retention did in each stage, and what it took; [] without a rule."""
    lines = []
    for stage in ("sft", "grpo"):
        rows = [r for r in logged if r["stage"] == stage and r.get("retention/kl") is not None]
        if not rows:
            continue
        last = rows[-max(1, len(rows) // 5) :]
        kl = fmean(r["retention/kl"] for r in last)
        line = f"{STAGES[stage]}: KL(base ‖ model) on the base's replies was {kl:.4f} nats a token"
        line += " in the last steps"
        if "retention/slope" in last[-1]:
            raised = fmean(r["retention/slope"] > 0 for r in rows)
            kept = fmean(r["retention/slope_kept"] > 0 for r in rows)
            line += f"; to first order {raised:.0%} of the optimiser's steps raised it,"
            line += f" and {kept:.0%} of those taken"
        if any("retention/cut" in r for r in rows):
            cut = fmean(r.get("retention/cut") or 0 for r in rows)
            line += f"; what was taken out of a step was {cut:.2f} of its length"
        took = fmean(r.get("seconds/retention") or 0 for r in rows)
        whole = fmean(r.get("seconds/step") or 0 for r in rows)
        share = f", beside {whole:.2f} of the rest" if whole else ""
        lines.append(f"{line}; it took {took:.2f} s a step{share}.")
    head = f"Rule {settings.get('rule')}, replies to {', '.join(settings.get('prompts', ()))}."
    return ["## Retention", head, _bullets(lines)] if lines else []


def change_cell(measure: Mapping[str, Any] | None, sign: int = 1) -> str:
    """A change in points, bold where its interval excludes 0; `sign` -1 turns gain into loss."""
    if measure is None:
        return ""
    value, low, high = (sign * x + 0.0 for x in percent(measure))  # no -0.0
    low, high = sorted((low, high))
    text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""A table of text as Markdown.

    >>> markdown(["arm", "%"], [["sft", "55.7"]])
    '| arm | % |\n| --- | --- |\n| sft | 55.7 |'
    """
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(measure: Mapping[str, Any] | None) -> str:
    """A share in per cent with its interval.

    >>> cell({"value": 0.5, "interval": [0.4, 0.61]}), cell(None)
    ('50.0 [40.0, 61.0]', '')
    """
    if measure is None:
        return ""
    value, low, high = percent(measure)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]" if measure.get("interval") else f"{value:.1f}"


def nats(measure: Mapping[str, Any] | None) -> str:
    """A measure in nats with its interval.

    >>> nats({"value": 0.4551, "interval": [0.4, 0.51]}), nats(None)
    ('0.455 [0.400, 0.510]', '')
    """
    if measure is None:
        return ""
    low, high = measure["interval"]
    return f"{measure['value']:.3f} [{low:.3f}, {high:.3f}]"


def _replies(rows: Sequence[Mapping[str, Any]], most: int = 3) -> list[str]:
    """The same held-out prompts through all stages; without these, the last training samples."""
    held_out = [row for row in rows if row.get("kind") == "held-out"]
    stages: dict[str, list] = {}
    for row in held_out or rows[-most:]:
        stages.setdefault(row["prompt"], []).append(row)
    parts = []
    for prompt in sorted(stages, key=lambda p: -len(stages[p]))[:most]:
        gold = stages[prompt][0].get("gold")
        parts += ["**Prompt**", _fenced(prompt), *([f"gold: {gold}"] if gold else [])]
        for row in stages[prompt]:
            scores = ", ".join(f"{k} {v:g}" for k, v in row["rewards"].items() if v is not None)
            parts += [f"**{STAGES[row['stage']]}** ({scores})", _fenced(row["reply"])]
    return parts or ["No samples were written."]


def _fenced(text: str, most: int = 700) -> str:
    text = text if len(text) <= most else f"{text[:most]} … ({len(text)} characters)"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def facts(manifest: Mapping[str, Any]) -> dict[str, str]:
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
        "rewards": ", ".join(grpo.get("rewards", functions.REWARDS)),
        "minutes": ", ".join(f"{k} {v:.1f}" for k, v in minutes.items()) or "not known",
        "device": f"{device}, {hardware.get('memory_gib', '?')} GiB memory, {hardware['system']}",
        "seed": str(settings["run"]["seed"]),
        "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
        "code": f"{git['commit'] or 'installed'}{', with local changes' if git['dirty'] else ''}",
        "time": f"{manifest['start']} to {manifest['end'] or 'now'}, status {manifest['status']}",
    }


def pooled(folders: Sequence[Path]) -> dict[str, Any]:
    """Results of several runs as of one, as in evaluation.json: measures and paired differences.

    A disease, or a general prompt, is one cluster over all runs: seeds of the model do not make
    more diseases. Raises InputError where settings other than run.seed differ, or nothing is there.
    """
    first: dict[str, Any] = {}
    for folder in folders:
        if not (folder / "run.json").exists():
            raise InputError(f"{folder}: no run.json; name the folders of finished runs")
        settings = config.leaves(record.manifest_of(folder)["settings"])
        settings.pop("run.seed", None)
        first = first or settings
        for key in (k for k in settings if settings[k] != first.get(k)):
            raise InputError(f"{folder}: {key} differs from {folders[0]}; pool seeds of one set-up")
    return summed(merged([item_rows(folder) for folder in folders]))


def summed(rows: Mapping[str, Sequence[Mapping]]) -> dict[str, Any]:
    """Results of item rows by stage, as in evaluation.json."""
    results: dict[str, Any] = {stage: measures.summary(found) for stage, found in rows.items()}
    return results | {"difference": measures.changes(rows), "kl": measures.divergences(rows)}


def item_rows(folder: Path) -> dict[str, list[dict]]:
    """Item rows of one run by stage."""
    return {p.stem: read_rows(p) for p in sorted((folder / "evaluation").glob("*.jsonl"))}


def merged(runs: Sequence[Mapping[str, Sequence[Mapping]]]) -> dict[str, list[dict]]:
    """Item rows of several runs as of one; `source` keeps them apart where they are paired."""
    rows: dict[str, list[dict]] = {}
    for number, run in enumerate(runs):
        for stage, found in run.items():
            kept = [{**row, "source": f"{row['source']} {number}"} for row in found]
            rows.setdefault(stage, []).extend(kept)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Write the reports again; prints the path of one, or the pooled table of several runs."""
    parser = argparse.ArgumentParser(prog="python -m bbkit.runs.report", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    folders = parser.parse_args(argv).runs

    def reports() -> int:
        together = pooled(folders) if len(folders) > 1 else {}
        paths = [write(folder) for folder in folders]
        print("\n\n".join(headline(together)) if together else paths[0])
        return 0

    return exit_code(reports)


if __name__ == "__main__":
    sys.exit(main())
