"""Arms of the method against each other: whole runs over arms and seeds, and one table of them.

Serves every comparison between methods. Most arms of one seed share the base's replies and an SFT
(bbkit.study.arms). Each arm is an ordinary run folder, made by the command that its run.json names,
so that one can be run again.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bbkit import CannotRun, InputError, Unhealthy, config, exit_code
from bbkit.machine import files, minutes
from bbkit.runs import record
from bbkit.study import comparison, recorded, verdicts
from bbkit.study.arms import ARMS, DECISIVE, FIRST, MAIN, QUICK, Row, schedule


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
    p.add_argument("--decisive", action="store_true", help="every arm and seed of the design")
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
    kind = "-quick" if args.quick else "-decisive" if args.decisive else ""
    out = args.out or Path("runs") / f"study-{args.preset}{kind}"
    blocks: list[tuple[Sequence[str], Sequence[int]]] = [(arms, [*map(int, args.seeds.split(","))])]
    if args.decisive:
        args.set = ["run.threads=1", *args.set]  # more move last bits, and runs stand side by side
        blocks = [(names.split(","), range(FIRST, FIRST + n)) for names, n in DECISIVE]
    rows = [*dict.fromkeys(row for block in blocks for row in schedule(*block, out))]
    if not args.table:
        print(plan(args, rows), flush=True)
        _run_all(args, rows)
    there = [row.folder for row in rows if _done(row.folder)]
    missing = [row.folder.name for row in rows if row.folder not in there]
    if missing := [name for name in missing if not name.startswith("sft-")]:  # no arm of its own
        print(f"not finished, and not in the table: {', '.join(missing)}")
    if there:
        found = recorded.pack(there)
        if args.decisive:
            found = recorded.brief(found)
        if args.record:
            if args.record.exists():
                found = recorded.joined(recorded.read(args.record), found, str(args.record))
            files.write_bytes(args.record, recorded.as_json(found).encode())
        print(verdicts.page(found) if args.decisive else comparison.page(found))
    return 0


def plan(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    """What is to be run, what of it is there, and about how long the rest takes."""
    left = [row for row in rows if not _done(row.folder)]
    if not left:
        return f"{len(rows)} runs, all there"
    spent = 0.0
    for row in left:
        settings = config.load(args.preset, None, _overrides(args, row))
        told = minutes.estimate(args.preset, settings, ("sft", "grpo", "evaluate"))
        if row.shared and told:  # base and SFT are there, evaluated
            told = {"grpo": told["grpo"], "evaluate": told["evaluate"] / 3}
        spent += sum(told.values())
    time = "minutes not known"
    if spent:
        time = f"about {spent:.0f} minutes on {minutes.RECORDED[args.preset].machine}"
    names = ", ".join(row.folder.name for row in left)
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
        ready = [row for row in waiting if row.shared not in left]
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
                if type(error) is not KeyboardInterrupt:  # Ctrl-C has reached them too
                    process.terminate()
            for process in others:
                process.wait()  # they take some seconds to save
            raise


def _commands(args: argparse.Namespace, row: Row) -> Iterator[list[str]]:
    """What remains to be run for a row: its run, begun where it goes on from, and a probe."""
    folder, overrides = row.folder, _overrides(args, row)
    given = [f"--data-dir={args.data_dir}"] if args.data_dir else []
    given += ["--offline"] if args.offline else []
    words = ["python", "-m", "bbkit.train", "--preset", args.preset, "--out", str(folder)]
    words += [*(f"--set={item}" for item in overrides), *given]
    settings = config.to_dict(config.load(args.preset, None, overrides))
    if not (folder / "run.json").exists():
        if row.shared:
            fork(row.shared, folder, settings, words)
    elif change := _other(files.read_json(folder / "run.json")["settings"], settings):
        raise InputError(f"{folder}: {change}; undo it or use another --out")
    if not _done(folder):
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
    with folder.with_suffix(".log").open("a") if beside else nullcontext() as log:
        return subprocess.Popen([sys.executable, *words[1:]], stdout=log, stderr=log)


def _refuse(folder: Path, code: int) -> None:
    if code == 130:
        raise KeyboardInterrupt
    if code:
        kind = {2: InputError, 4: Unhealthy}.get(code, CannotRun)
        log = folder.with_suffix(".log")
        where = f"see {log}" if log.exists() else "see the lines above"
        raise kind(f"{folder}: its run ended with exit code {code}; {where}")


def _done(folder: Path) -> bool:
    """Whether a run has ended well, its last model evaluated."""
    path = folder / "run.json"
    return path.exists() and files.read_json(path)["status"] == "done"


def _other(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first setting in which a run differs; the number of threads moves last bits alone."""
    threads = {"threads": ours["run"]["threads"]}
    return record.first_difference({**theirs, "run": theirs["run"] | threads}, ours)


def fork(source: Path, target: Path, settings: Mapping[str, Any], command: Sequence[str]) -> None:
    """Begin the run of `command` in `target` with the base and SFT of the finished run `source`.

    Raises InputError where other settings than `grpo`'s differ: then the SFT would be another one.
    """
    manifest = files.read_json(source / "run.json")
    grpo = manifest["settings"]["grpo"]
    if change := _other(manifest["settings"], {**settings, "grpo": grpo}):
        raise InputError(f"{source}: cannot go on from its SFT, {change}")
    half = target.with_name(f".{target.name}")
    shutil.rmtree(half, ignore_errors=True)
    with files.guarded(half):
        left = ("checkpoint-*", ".lock", "probe.json", "report.md", "figures")
        shutil.copytree(source, half, ignore=shutil.ignore_patterns(*left))
        shutil.rmtree(half / "adapter", ignore_errors=True)  # of its last stage
        manifest |= {"settings": settings, "status": "forked", "end": None}
        manifest |= {"command": shlex.join(command), "git": record.machine()["git"]}
        manifest["forked_from"] = source.name
        manifest.pop("rewards", None)  # the files of own ones; the target's may be others
        files.write_json(half / "run.json", manifest)
        half.rename(target)
