"""Arms of the method against each other: whole runs over arms and seeds, and one table of them.

Serves every comparison between methods. Arms of one seed share the base and the SFT, which is
trained once; GRPO then starts from the very same adapter. Each arm is an ordinary run folder, made
by the command that its run.json names, so that a single row can be run again by hand.
"""

import argparse
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bbkit import config, files, record, recorded, report
from bbkit.config import CannotRun, InputError, Unhealthy

FULL = (
    "grpo.advantages=capability", "grpo.controller.rule=deficit", "grpo.combination=dual_cone",
    "grpo.retention=4",
)  # fmt: skip
ARMS: dict[str, tuple[str, ...]] = {
    "grpo": ("grpo.advantages=grpo", "grpo.controller.rule=fixed", "grpo.combination=sum"),
    "gdpo": ("grpo.advantages=gdpo", "grpo.controller.rule=fixed", "grpo.combination=sum"),
    "static": ("grpo.advantages=capability", "grpo.controller.rule=fixed", "grpo.combination=sum"),
    "dynamic": (
        "grpo.advantages=capability",
        "grpo.controller.rule=deficit",
        "grpo.combination=sum",
    ),
    "orthogonal": (*FULL[:3], "grpo.retention=0"),
    "full": FULL,
}
SHOWN = {
    "domain": "domain",
    "domain_lenient": "leniently",
    "reasoning": "reasoning",
    "instruction": "instructions",
    "instruction_unseen": "unseen kinds",
}


def parser() -> argparse.ArgumentParser:
    """The options of `python -m bbkit.study`."""
    p = argparse.ArgumentParser(
        prog="python -m bbkit.study",
        description="Arms of the method over seeds; a study that was cut off goes on.",
    )
    p.add_argument("--preset", default="pocket", choices=config.PRESETS)
    p.add_argument("--arms", default="grpo,gdpo,static,full", help=f"of {', '.join(ARMS)}")
    p.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: runs/study-PRESET")
    p.add_argument("--probe", type=int, default=0, metavar="N", help="noise, on N prompts a seed")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every arm")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="as for bbkit.train")
    p.add_argument("--offline", action="store_true", help="as for bbkit.train")
    p.add_argument("--table", action="store_true", help="run nothing; the table of what is there")
    p.add_argument("--record", type=Path, metavar="FILE", help="write what tables are made from")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints one line for a known error."""
    args = parser().parse_args(argv)
    return config.exit_code(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    arms = args.arms.split(",")
    for arm in arms:
        if arm not in ARMS:
            raise InputError(f"--arms {args.arms}: no arm {arm!r}; use {', '.join(ARMS)}")
    if not all(seed.isdecimal() for seed in args.seeds.split(",")):
        raise InputError(f"--seeds {args.seeds}: whole numbers with commas, as 0,1,2")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    out = args.out or Path("runs") / f"study-{args.preset}"
    if not args.table:
        for seed in seeds:
            shared = out / f"sft-{seed}"
            _train(args, seed, ("grpo.steps=0",), shared)
            if args.probe:
                _probe(args, shared)
            for arm in arms:
                _train(args, seed, ARMS[arm], out / f"{arm}-{seed}", shared)
    names = [f"{arm}-{seed}" for arm in arms for seed in seeds]
    there = [name for name in names if _evaluated(out / name)]
    if missing := [name for name in names if name not in there]:
        print(f"not finished, and not in the table: {', '.join(missing)}")
    if there:
        shared = sorted({f"sft-{name.rpartition('-')[2]}" for name in there})
        found = recorded.pack([out / name for name in shared + there])
        if args.record:
            files.write_bytes(args.record, recorded.text(found).encode())
        print(table(found))
    return 0


def _train(
    args: argparse.Namespace,
    seed: int,
    arm: Sequence[str],
    folder: Path,
    shared: Path | None = None,
) -> None:
    """One run in a process of its own, so that no arm sees what another left in memory.

    With `shared`, it goes on from the SFT of that run.
    """
    overrides = [*args.set, *arm, f"run.seed={seed}"]
    words = ["python", "-m", "bbkit.train", "--preset", args.preset, "--out", str(folder)]
    words += [f"--set={item}" for item in overrides]
    words += [f"--data-dir={args.data_dir}"] if args.data_dir else []
    words += ["--offline"] if args.offline else []
    settings = config.to_dict(config.load(args.preset, None, overrides))
    if not (folder / "run.json").exists() and shared:
        fork(shared, folder, settings, words)
    elif (folder / "run.json").exists():
        manifest = files.read_json(folder / "run.json")
        if change := record.first_difference(manifest["settings"], files.plain(settings)):
            raise InputError(f"{folder}: {change}; undo it or use another --out")
        if manifest["status"] == "done":
            return
    _run(words, folder)


def _probe(args: argparse.Namespace, shared: Path) -> None:
    """The noise of each advantage scheme at the SFT that the arms of a seed begin with."""
    out = shared / "probe.json"
    if out.exists() and files.read_json(out)["prompts"] == args.probe:
        return
    words = ["python", "-m", "bbkit.probe", str(shared), "--prompts", str(args.probe)]
    words += ["--out", str(out)]
    words += [f"--data-dir={args.data_dir}"] if args.data_dir else []
    _run(words + (["--offline"] if args.offline else []), shared)


def _run(words: Sequence[str], folder: Path) -> None:
    print(f"+ {shlex.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, *words[1:]])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # it has had the same signal, and takes some seconds to save
        process.wait()
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code:
        kind = {2: InputError, 4: Unhealthy}.get(code, CannotRun)
        raise kind(f"{folder}: its run ended with exit code {code}; see the lines above")


def _evaluated(folder: Path) -> bool:
    manifest = folder / "run.json"
    return manifest.exists() and "evaluate grpo" in files.read_json(manifest)["stages"]


def fork(source: Path, target: Path, settings: Mapping[str, Any], command: Sequence[str]) -> None:
    """Begin the run of `command` in `target` with the base and SFT of the finished run `source`.

    Raises InputError where other settings than `grpo`'s differ: then the SFT would be another one.
    """
    manifest = files.read_json(source / "run.json")
    theirs, ours = dict(manifest["settings"]), dict(files.plain(settings))
    for kept in (theirs, ours):
        kept.pop("grpo")
    if change := record.first_difference(theirs, ours):
        raise InputError(f"{source}: cannot go on from its SFT, {change}")
    half = target.with_name(f".{target.name}")
    shutil.rmtree(half, ignore_errors=True)
    with files.guarded(half):
        own = shutil.ignore_patterns("checkpoint-*", ".lock", "probe.json")
        shutil.copytree(source, half, ignore=own)
        for made_later in ("adapter", "figures"):
            shutil.rmtree(half / made_later, ignore_errors=True)
        manifest |= {"settings": files.plain(settings), "status": "forked", "end": None}
        manifest |= {"forked_from": source.name, "command": shlex.join(command)}
        files.write_json(half / "run.json", manifest)
        half.rename(target)


def table(kept: Mapping[str, Any]) -> str:
    """Results of all arms of a record (bbkit.recorded) as one table; changes are to the first arm.

    Intervals are over diseases and prompts; what the seed of the training does is shown by each
    seed's own change.
    """
    from bbkit import evaluate

    names: dict[str, list[str]] = {}
    for name, run in kept["runs"].items():
        if run["from"]:
            names.setdefault(name.rpartition("-")[0], []).append(name)
    each = {arm: [recorded.unpack(kept, n) for n in runs] for arm, runs in names.items()}
    rows = {arm: report.merged(runs) for arm, runs in each.items()}
    found = {arm: report.summed(pooled) for arm, pooled in rows.items()}
    first = next(iter(rows))
    head = ["%", *SHOWN.values(), "tax", "KL, questions", "KL, instructions", "gradient noise"]
    lines = [head]
    shared = found[first]
    for name, stage in (("base", "base"), ("SFT", "sft")) if "sft" in shared else ():
        lines.append([name, *_cells(shared, stage), ""])
    for arm, results in found.items():
        lines.append([arm, *_cells(results, "grpo"), noise_cell(kept, names[arm])])
    for arm in list(rows)[1:]:
        change = evaluate.difference(rows[first]["grpo"], rows[arm]["grpo"])
        seeds = [
            evaluate.difference(a["grpo"], b["grpo"], 1)
            for a, b in zip(each[first], each[arm], strict=False)
        ]
        cells = [
            f"{report.change_cell(change[name])}; seeds "
            + " ".join(f"{100 * seed[name]['value']:+.0f}" for seed in seeds)
            for name in SHOWN
            if name in change
        ]
        lines.append([f"{arm} − {first}", *cells, "", "", "", ""])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(results: Mapping[str, Any], stage: str) -> list[str]:
    cells = [report.cell(results[stage].get(name)) for name in SHOWN]
    lost = results["difference"].get(f"{stage}-base", {}).get("instruction")
    cells.append(report.change_cell(lost, sign=-1))
    for key in (stage, f"{stage}_instruction"):
        told = results["kl"].get(key)
        cells.append(f"{told['value']:.3f}" if told else "")
    return cells


def noise_cell(kept: Mapping[str, Any], names: Sequence[str]) -> str:
    """Noise to signal of an arm's gradient over GRPO's at the same SFT, geometric mean over seeds.

    As the probe of the runs that the arms were forked from has it; empty where one has none, or
    shows no signal beyond the noise.
    """
    logs, errors = [], []
    for run in (kept["runs"][name] for name in names):
        section = run["grpo"]
        combined = "" if section["combination"] == "sum" else f" + {section['combination']}"
        noise = kept["runs"][run["from"]]["noise"] or {}
        row = noise.get(section["advantages"] + combined)
        if not row or None in (row["ratio"], *row["interval"]):
            return ""
        logs.append(math.log(row["ratio"]))
        errors.append(math.log(row["interval"][1] / row["interval"][0]) / 2)
    middle = sum(logs) / len(logs)
    half = math.sqrt(sum(e**2 for e in errors)) / len(logs)
    low, high = math.exp(middle - half), math.exp(middle + half)
    return f"{math.exp(middle):.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    sys.exit(main())
