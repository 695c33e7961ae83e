"""Arms of the method against each other: whole runs over arms and seeds, and one table of them.

Serves every comparison between methods. All runs share what the base replied, and most arms of one
seed the SFT, which is trained once; GRPO then starts from the very same adapter. Each arm is an
ordinary run folder, made by the command that its run.json names, so that one can be run again.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bbkit import comparison, config, files, minutes, record, recorded
from bbkit.errors import CannotRun, InputError, Terminated, Unhealthy, exit_code


def _arm(
    advantages: str = "capability", rule: str = "deficit", combination: str = "sum"
) -> tuple[str, ...]:
    return (
        f"grpo.advantages={advantages}", f"grpo.controller.rule={rule}",
        f"grpo.combination={combination}",
    )  # fmt: skip


def _kept(rule: str, prompts: str = "") -> tuple[str, ...]:
    """A rule, with the first guess at a weight, on the preset's prompts or on others."""
    on = (f"retention.prompts=[{prompts}]",) if prompts else ()
    return (f"retention.rule={rule}", "retention.weight=0.2", *on)


def _less(left_out: str) -> str:
    """Every kind of broad prompts but one."""
    kinds = ("chat", "question", "echo", "instruction")
    return ",".join(f"pocket_prompts/{kind}" for kind in kinds if kind != left_out)


COMBINED = ("pcgrad", "upgrad", "aligned_mtl", "dual_cone")
# Ways to pay less tax, each an SFT of its own (regime 1: no GRPO), and then the GRPO on domain
# questions alone that goes on from it (regime 2: nothing rewards what is forgotten).
TAX: dict[str, tuple[str, ...]] = {
    "averaging": ("sft.averaging=0.5",),
    "slower": ("sft.learning_rate=2e-3",),
    "dft": ("sft.loss_type=dft",),
    "replay": ("sft.replay=0.167",),  # a reply for five rows: as the penalty's weight
    "cone": _kept("cone"),
    "penalty": _kept("penalty"),
    "step": _kept("step"),
    "penalty_instructions": _kept("penalty", "constraints"),
    "step_instructions": _kept("step", "constraints"),
    "penalty_less_chat": _kept("penalty", _less("chat")),
    "penalty_less_instruction": _kept("penalty", _less("instruction")),
}
# One knob of retention changed at a time (bbkit.taxes.KNOBS).
KNOBS = {f"penalty_weight_{x}": (*TAX["penalty"], f"retention.weight={x}") for x in (0.05, 1, 5)}
KNOBS |= {f"step_budget_{x}": (*TAX["step"], f"retention.budget={x}") for x in (0.002, 0.03)}
KNOBS |= {f"penalty_replies_{n}": (*TAX["penalty"], f"retention.replies={n}") for n in (64, 2048)}
# Of a real model: prompts of open data, where its preset's are `self`.
OPEN = "general_instructions,general_instructions/seed_tasks,constraints"
KNOBS["penalty_open"] = (*_kept("penalty", OPEN), "retention.weight=1")
ALONE = ("grpo.instruction_share=0.0",)
ARMS: dict[str, tuple[str, ...]] = {
    # without GRPO, each with an SFT of its own, as all that change its settings or the data
    **{name: ("grpo.steps=0", *changed) for name, changed in (TAX | KNOBS).items()},
    # from the SFT of that name, or from the one that a seed's arms share
    "alone": ALONE,
    "alone_kl": (*ALONE, "grpo.beta=0.1"),
    **{f"alone_{name}": (*ALONE, *changed) for name, changed in (TAX | KNOBS).items()},
    # the whole method on the step: no reward falls, and its budget holds
    "alone_full": (*ALONE, *_arm(combination="dual_cone"), "grpo.metric=step", *TAX["step"]),
    "grpo": _arm("grpo", "fixed"),
    "judged": (*_arm("grpo", "fixed"), "grpo.judge=0.5"),
    "dr_grpo": (*_arm("dr_grpo", "fixed"), "grpo.loss_type=dr_grpo"),
    "gdpo": _arm("gdpo", "fixed"),
    "static": _arm(rule="fixed"),
    "dynamic": _arm(),
    "variance": _arm(rule="variance"),
    "covariance": _arm(rule="covariance"),
    "agreement": _arm(rule="agreement"),
    "random": _arm(combination="random"),
    **{name: _arm(combination=name) for name in COMBINED if name != "dual_cone"},
    "orthogonal": _arm(combination="dual_cone"),
    "full": (*_arm(combination="dual_cone"), "grpo.metric=step", *TAX["step"]),
    # GRPO on single facts, instead of the questions of two hops that are held out
    "plain": (*_arm("grpo", "fixed"), "data.grpo=[ontology,constraints]"),
    # what the hypotheses of bbkit.comparison change
    "dynamic_fast": (*_arm(), "grpo.controller.rate=1.0"),
    "static_unfloored": (*_arm(rule="fixed"), "grpo.sigma_floor=0.01"),
}
# The SFT that an arm goes on from, where it is that of another arm and not the shared one.
FROM = {f"alone_{name}": name for name in TAX | KNOBS} | {"alone_full": "step", "full": "step"}
# How the presets' retention is chosen, written down before the table on validation, seeds 100 to
# 102: of the arms of TAX that keep replies, those whose mean `general` is at most 3 points below
# the base's and whose worst kind elsewhere is at most 0.1 nat above it after SFT, 0.15 after GRPO
# alone; of these the highest mean of lenient domain over both regimes; among those within 2 points
# of it the simplest, penalty before step before cone. Where none is (on the first two seeds penalty
# missed general by 0.1 point), penalty at the smallest weight of KNOBS that is, on the same seeds;
# added before any run of another weight was looked at. So it came: weight 1, in all presets.
BASE = ("model", "data", "evaluation")  # the settings that say what the untrained model is asked
MAIN = "averaging,grpo,gdpo,static,dynamic,full"
# Two arms, two seeds and a quarter of the steps: what a workshop has time for.
QUICK = {"arms": "grpo,full", "seeds": "0,1", "set": ["grpo.steps=15", "grpo.save_steps=15"]}


class Row(NamedTuple):
    """One run of a study; `shared` is the run whose SFT it goes on from, None: its own."""

    folder: Path
    seed: int
    overrides: tuple[str, ...]
    shared: Path | None


def parser() -> argparse.ArgumentParser:
    """The options of `python -m bbkit.study`."""
    p = argparse.ArgumentParser(
        prog="python -m bbkit.study",
        description="Arms of the method over seeds; a study that was cut off goes on.",
    )
    p.add_argument("--preset", default="pocket", choices=config.PRESETS)
    p.add_argument("--arms", default=MAIN, help=f"of {', '.join(ARMS)} (default: {MAIN})")
    p.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    p.add_argument("--quick", action="store_true", help="two arms, two seeds, 15 GRPO steps")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: runs/study-PRESET")
    p.add_argument("--probe", type=int, default=0, metavar="N", help="noise, on N prompts a seed")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every arm")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="as for bbkit.train")
    p.add_argument("--offline", action="store_true", help="as for bbkit.train")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side (a GPU)")
    p.add_argument("--table", action="store_true", help="run nothing; the table of what is there")
    p.add_argument("--record", type=Path, metavar="FILE", help="keep, or add, what tables show")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints one line for a known error."""
    args = parser().parse_args(argv)
    return exit_code(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    if args.quick:
        args.arms, args.seeds = QUICK["arms"], QUICK["seeds"]
        args.set = [*QUICK["set"], *args.set]
    arms = args.arms.split(",")
    for arm in arms:
        if arm not in ARMS:
            raise InputError(f"--arms {args.arms}: no arm {arm!r}; use {', '.join(ARMS)}")
    if not all(seed.isdecimal() for seed in args.seeds.split(",")):
        raise InputError(f"--seeds {args.seeds}: whole numbers with commas, as 0,1,2")
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: 1 or more")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    out = args.out or Path("runs") / f"study-{args.preset}{'-quick' if args.quick else ''}"
    if not args.table:
        rows = schedule(arms, seeds, out)
        print(plan(args, rows), flush=True)
        _run_all(args, rows)
    names = [f"{arm}-{seed}" for arm in _needed(arms) for seed in seeds]
    there = [name for name in names if _evaluated(out / name)]
    if missing := [name for name in names if name not in there]:
        print(f"not finished, and not in the table: {', '.join(missing)}")
    if there:
        shared = sorted({f"sft-{name.rpartition('-')[2]}" for name in there})
        found = recorded.pack([out / name for name in shared + there])
        if args.record:
            if args.record.exists():
                found = recorded.joined(recorded.read(args.record), found, str(args.record))
            files.write_bytes(args.record, recorded.text(found).encode())
        print(comparison.told(found))
    return 0


def schedule(arms: Sequence[str], seeds: Sequence[int], out: Path) -> list[Row]:
    """The runs of a study in their order.

    >>> [(r.folder.name, r.shared) for r in schedule(["grpo"], [7], Path("runs"))]
    [('sft-7', None), ('grpo-7', PosixPath('runs/sft-7'))]
    """
    rows = []
    for seed in seeds:
        first = out / f"sft-{seed}"
        rows.append(Row(first, seed, ("grpo.steps=0",), None))
        for arm in _needed(arms):
            own = arm in (TAX | KNOBS) or any(item.startswith("data.") for item in ARMS[arm])
            start = out / f"{FROM[arm]}-{seed}" if arm in FROM else None if own else first
            rows.append(Row(out / f"{arm}-{seed}", seed, ARMS[arm], start))
    return rows


def _needed(arms: Sequence[str]) -> list[str]:
    """Arms behind those whose SFT they go on from, each once."""
    return [*dict.fromkeys(name for arm in arms for name in (FROM.get(arm), arm) if name)]


def plan(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    """What is to be run, what of it is there, and about how long the rest takes."""
    left = [row for row in rows if not _evaluated(row.folder)]
    spent = 0.0
    for row in left:
        settings = config.load(args.preset, None, _overrides(args, row))
        stages = ("grpo",) if row.shared else ("sft", "grpo")
        one = minutes.estimate(args.preset, settings, ("evaluate",)).get("evaluate", 0.0)
        evaluations = 1 + (row is rows[0])  # the base, which all others take from it
        evaluated = 1 + bool(settings.sft.steps) + bool(settings.grpo.steps)
        spent += sum(minutes.estimate(args.preset, settings, stages).values())
        spent += one * evaluations / evaluated
    if not left:
        return f"{len(rows)} runs, all there"
    names = ", ".join(row.folder.name for row in left)
    time = "minutes not known"
    if spent:
        time = f"about {spent:.0f} minutes on {minutes.RECORDED[args.preset].machine}"
    return f"{len(rows)} runs, {len(left)} to do ({time}): {names}"


def _overrides(args: argparse.Namespace, row: Row) -> list[str]:
    # what an arm keeps it says itself, whatever the preset does
    return ["retention.rule=none", *args.set, *row.overrides, f"run.seed={row.seed}"]


def _run_all(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Each row once what it goes on from is there, in processes of their own, `--jobs` at a time.

    So no arm sees what another left in memory. Where one fails, or a person stops the study, those
    beside it are told to stop; they save.
    """
    waiting, running = list(rows), dict[Row, tuple[Iterator, subprocess.Popen | None]]()
    while waiting or running:
        left = {row.folder for row in (*waiting, *running)}
        # One with an SFT of its own still takes the base's replies from the first row.
        ready = [r for r in waiting if (r.shared or rows[0].folder) not in left or r is rows[0]]
        for row in ready[: args.jobs - len(running)]:
            waiting.remove(row)
            running[row] = (_commands(args, row), None)
        try:
            for row, (commands, process) in list(running.items()):
                if process and process.poll() is None:
                    continue
                _refuse(row.folder, process.returncode if process else 0)
                if (words := next(commands, None)) is None:
                    del running[row]
                else:
                    running[row] = (commands, _start(words, row.folder, args.jobs > 1))
            time.sleep(0.1)
        except BaseException as error:
            others = [process for _, process in running.values() if process]
            for process in others:
                # Ctrl-C has reached them too; they take some seconds to save
                if process.poll() is None and (
                    isinstance(error, Terminated) or not isinstance(error, KeyboardInterrupt)
                ):
                    process.terminate()
            for process in others:
                process.wait()
            raise


def _commands(args: argparse.Namespace, row: Row) -> Iterator[list[str]]:
    """What remains to be run for a row: its run, begun where it goes on from, and a probe."""
    folder, overrides = row.folder, _overrides(args, row)
    given = [f"--data-dir={args.data_dir}"] if args.data_dir else []
    given += ["--offline"] if args.offline else []
    words = ["python", "-m", "bbkit.train", "--preset", args.preset, "--out", str(folder)]
    words += [*(f"--set={item}" for item in overrides), *given]
    settings = config.to_dict(config.load(args.preset, None, overrides))
    done = False
    if not (folder / "run.json").exists():
        if row.shared:
            fork(row.shared, folder, settings, words)
        elif other := _same_base(folder.parent, settings):
            fork(other, folder, settings, words, base_only=True)
    else:
        manifest = files.read_json(folder / "run.json")
        if change := _other(manifest["settings"], settings):
            raise InputError(f"{folder}: {change}; undo it or use another --out")
        done = manifest["status"] == "done"
    if not done:
        yield words
    if args.probe and folder.name == f"sft-{row.seed}":
        # the noise of each advantage scheme at the SFT that the arms of a seed begin with
        out = folder / "probe.json"
        if not out.exists() or files.read_json(out)["prompts"] != args.probe:
            words = ["python", "-m", "bbkit.probe", str(folder), "--prompts", str(args.probe)]
            yield [*words, "--out", str(out), *given]


def _start(words: Sequence[str], folder: Path, beside: bool) -> subprocess.Popen:
    """The command as a process; what it says goes into a file where others run `beside` it."""
    print(f"+ {shlex.join(words)}", flush=True)
    if not beside:
        return subprocess.Popen([sys.executable, *words[1:]])
    with folder.with_suffix(".log").open("a") as log:
        command = [sys.executable, *words[1:]]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _refuse(folder: Path, code: int) -> None:
    if code == 130:
        raise KeyboardInterrupt
    if code:
        kind = {2: InputError, 4: Unhealthy}.get(code, CannotRun)
        log = folder.with_suffix(".log")
        where = f"see {log}" if log.exists() else "see the lines above"
        raise kind(f"{folder}: its run ended with exit code {code}; {where}")


def _evaluated(folder: Path) -> bool:
    """Whether the last model of a run was evaluated."""
    if not (folder / "run.json").exists():
        return False
    manifest = files.read_json(folder / "run.json")
    last = "grpo" if manifest["settings"]["grpo"]["steps"] else "sft"
    return f"evaluate {last}" in manifest["stages"]


def _other(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first setting in which a run differs; the number of threads moves last bits alone."""
    theirs, ours = (
        {**kept, "run": {k: v for k, v in kept["run"].items() if k != "threads"}}
        for kept in (theirs, files.plain(ours))
    )
    return record.first_difference(theirs, ours)


def _same_base(out: Path, settings: Mapping[str, Any]) -> Path | None:
    """A run under `out` that has evaluated the same base on the same prompts."""
    for path in sorted(out.glob("sft-*/run.json")):
        manifest = files.read_json(path)
        same = all(manifest["settings"][part] == files.plain(settings)[part] for part in BASE)
        if same and "evaluate base" in manifest["stages"]:
            return path.parent
    return None


def fork(
    source: Path,
    target: Path,
    settings: Mapping[str, Any],
    command: Sequence[str],
    base_only: bool = False,
) -> None:
    """Begin the run of `command` in `target` with the base and SFT of the finished run `source`.

    With `base_only` with what the base replied there, which no seed of training changes.
    Raises InputError where other settings than `grpo`'s differ: then the SFT would be another one.
    """
    manifest = files.read_json(source / "run.json")
    grpo = manifest["settings"]["grpo"]
    if not base_only and (change := _other(manifest["settings"], {**settings, "grpo": grpo})):
        raise InputError(f"{source}: cannot go on from its SFT, {change}")
    half = target.with_name(f".{target.name}")
    shutil.rmtree(half, ignore_errors=True)
    with files.guarded(half):
        left = ["checkpoint-*", ".lock", "probe.json", "report.md"]
        left += ["sft", "sft.jsonl", "replies.jsonl", "metrics.jsonl"] if base_only else []
        shutil.copytree(source, half, ignore=shutil.ignore_patterns(*left))
        for made_later in ("adapter", "figures"):
            shutil.rmtree(half / made_later, ignore_errors=True)
        manifest |= {"settings": files.plain(settings), "status": "forked", "end": None}
        manifest |= {"command": shlex.join(command), "git": record.machine()["git"]}
        if base_only:
            manifest |= {"base_from": source.name, "sessions": []}
            manifest["stages"] = {"evaluate base": manifest["stages"]["evaluate base"]}
            measures = files.read_json(half / "evaluation.json")
            files.write_json(half / "evaluation.json", {"base": measures["base"]})
            lines = (half / "samples.jsonl").read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["stage"] == "base"]
            files.write_bytes(half / "samples.jsonl", b"".join(kept))
        else:
            manifest |= {"forked_from": source.name}
        files.write_json(half / "run.json", manifest)
        half.rename(target)


if __name__ == "__main__":
    sys.exit(main())
