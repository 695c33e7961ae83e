"""Arms of the method against each other: whole runs over arms and seeds, and one table of them.

Serves every comparison between methods. Arms of one seed share the base and the SFT, which is
trained once; GRPO then starts from the very same adapter. Each arm is an ordinary run folder, made
by the command that its run.json names, so that a single row can be run again by hand.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bbkit import config, files, record, report
from bbkit.config import CannotRun, InputError

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
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every arm")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="as for bbkit.train")
    p.add_argument("--offline", action="store_true", help="as for bbkit.train")
    p.add_argument("--table", action="store_true", help="only the table of what is there")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints one line for a known error."""
    args = parser().parse_args(argv)
    try:
        return _main(args)
    except (InputError, CannotRun) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 3


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
            _train(_words(args, seed, ("grpo.steps=0",), shared), shared)
            for arm in arms:
                folder = out / f"{arm}-{seed}"
                settings = config.load(args.preset, None, _overrides(args, seed, ARMS[arm]))
                words = _words(args, seed, ARMS[arm], folder)
                fork(shared, folder, config.to_dict(settings), words)
                _train(words, folder)
    print(table({arm: [out / f"{arm}-{seed}" for seed in seeds] for arm in arms}))
    return 0


def _overrides(args: argparse.Namespace, seed: int, arm: Sequence[str]) -> list[str]:
    return [*args.set, *arm, f"run.seed={seed}"]


def _words(args: argparse.Namespace, seed: int, arm: Sequence[str], folder: Path) -> list[str]:
    """The command of one run, as a user would type it."""
    words = ["python", "-m", "bbkit.train", "--preset", args.preset, "--out", str(folder)]
    words += [f"--set={item}" for item in _overrides(args, seed, arm)]
    words += [f"--data-dir={args.data_dir}"] if args.data_dir else []
    return words + (["--offline"] if args.offline else [])


def _train(words: Sequence[str], folder: Path) -> None:
    """One run in a process of its own, so that no arm sees what another left in memory."""
    manifest = folder / "run.json"
    if manifest.exists() and files.read_json(manifest).get("status") == "done":
        return
    print(f"+ {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, *words[1:]]).returncode
    if code:
        raise CannotRun(f"{folder}: the run ended with exit code {code}; the same command goes on")


def fork(source: Path, target: Path, settings: Mapping[str, Any], command: Sequence[str]) -> None:
    """Begin the run of `command` in `target` with the base and SFT of the finished run `source`.

    Nothing happens where `target` has begun. Raises InputError where other settings than `grpo`'s
    differ: then the SFT would be another one.
    """
    if (target / "run.json").exists():
        return
    manifest = files.read_json(source / "run.json")
    theirs, ours = dict(manifest["settings"]), dict(files.plain(settings))
    for kept in (theirs, ours):
        kept.pop("grpo")
    if change := record.first_difference(theirs, ours):
        raise InputError(f"{source}: cannot go on from its SFT, {change}")
    half = target.with_name(f".{target.name}")
    shutil.rmtree(half, ignore_errors=True)
    with files.guarded(half):
        shutil.copytree(source, half, ignore=shutil.ignore_patterns("checkpoint-*", ".lock"))
        for made_later in ("adapter", "figures"):
            shutil.rmtree(half / made_later, ignore_errors=True)
        manifest |= {"settings": files.plain(settings), "status": "forked", "end": None}
        manifest |= {"forked_from": source.name, "command": shlex.join(command)}
        files.write_json(half / "run.json", manifest)
        half.rename(target)


def table(arms: Mapping[str, Sequence[Path]]) -> str:
    """Results of all arms, pooled over their runs, as one table; changes are to the first arm."""
    from bbkit import evaluate

    rows = {arm: report.pooled_rows(folders) for arm, folders in arms.items()}
    found = {arm: report.pooled(folders) for arm, folders in arms.items()}
    first = next(iter(arms))
    lines = [["%", *SHOWN.values(), "tax", "KL, questions", "KL, instructions"]]
    shared = found[first]
    for name, stage in (("base", "base"), ("SFT", "sft")):
        lines.append([name, *_cells(shared, stage)])
    for arm, results in found.items():
        lines.append([arm, *_cells(results, "grpo")])
    for arm in list(arms)[1:]:
        change = evaluate.difference(rows[first]["grpo"], rows[arm]["grpo"])
        cells = [report.change_cell(change.get(name)) for name in SHOWN]
        lines.append([f"{arm} − {first}", *cells, "", "", ""])
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


if __name__ == "__main__":
    sys.exit(main())
