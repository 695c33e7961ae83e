"""The command line of one run: base -> QLoRA SFT -> GRPO, evaluated between, into a run folder.

`python -m bbkit.train` needs nothing: without arguments it takes the preset that fits the machine.
Exit codes: 0 done, 2 bad input or configuration, 3 cannot run here, 4 training went unhealthy,
130 interrupted with the state saved. A run killed at any moment resumes to the same weights.
"""

import argparse
import importlib.util
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bbkit import CannotRun, InputError, config, exit_code, held_back
from bbkit.config import Settings
from bbkit.data.replies import Reply
from bbkit.machine import files, functions, gpu, hub, processes
from bbkit.prompts import Example
from bbkit.runs import record

STAGES = ("sft", "grpo", "evaluate")
KL_PROMPTS = 64  # of questions and of instructions, on whose replies the KL to the base is taken


def parser() -> argparse.ArgumentParser:
    """The options of `python -m bbkit.train`."""
    what = "QLoRA SFT, GRPO with the hybrid reward, and held-out evaluation of one model."
    p = argparse.ArgumentParser(prog="python -m bbkit.train", description=what)
    p.add_argument("--preset", help=f"one of {', '.join(config.PRESETS)}; default: by hardware")
    p.add_argument("--config", type=Path, metavar="FILE", help="YAML with keys as in the presets")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    p.add_argument("--stages", default=",".join(STAGES), help="of sft,grpo,evaluate (default: all)")
    p.add_argument("--seed", type=int, help="the same as --set run.seed=N")
    p.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/PRESET-SEED)")
    p.add_argument("--resume", default="auto", metavar="auto|no|DIR", help="default: auto")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="with the upstream data files")
    p.add_argument("--offline", action="store_true", help="connect to nothing")
    p.add_argument("--dry-run", action="store_true", help="print settings and plan, then stop")
    p.add_argument("--card", type=float, metavar="GB", help="with --dry-run: memory of the GPU")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints one line for a known error."""
    args = parser().parse_args(argv)
    words = ["python", "-m", "bbkit.train", *(sys.argv[1:] if argv is None else argv)]
    return exit_code(lambda: _main(args, words))


def _main(args: argparse.Namespace, command: list[str]) -> int:
    stages = args.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        use = f"no stage {unknown[0]!r}; use {', '.join(STAGES)}"
        raise InputError(f"--stages {args.stages}: {use}")
    # Near 24 GB the KV cache, which grows by copies, would leave no free block large enough.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    preset = args.preset
    if preset is None:
        preset, reason = gpu.choose_preset()
        print(f"preset {preset}: {reason}")
    seed = [] if args.seed is None else [f"run.seed={args.seed}"]
    settings = config.load(preset, args.config, args.set + seed)
    hub.go_private(args.offline or settings.model.name == "pocket")
    if args.card and not args.dry_run:
        raise InputError("--card says what a dry run plans for; add --dry-run")
    if args.dry_run:
        from bbkit.runs import dry_run

        return dry_run.show(preset, settings, stages, args.offline, args.card)
    asked = settings.run.report_to
    if asked != "none" and importlib.util.find_spec(asked) is None:
        raise CannotRun(f"run.report_to={asked}: not installed here; pip install {asked}")
    out = args.out or Path("runs") / f"{preset}-{settings.run.seed}"
    processes.join()
    resume = record.resolve_resume(args.resume, out)
    rows = load_rows(settings, args.data_dir)
    with record.Run(resume or out, config.to_dict(settings), command, resume) as run:
        execute(run, settings, rows, stages, args.data_dir, args.offline)
    return 0


def load_rows(settings: Settings, data_dir: Path | None) -> dict[str, list[Example]]:
    """The rows of each stage, `sft`, `grpo` and `held_out`, checked before any training.

    Raises InputError where a test split would be trained on, a row breaks the rewards (gold must
    score full, wrong choices nothing), or nothing is left to train on.
    """
    from bbkit import data, rewards
    from bbkit.data import contamination, instructions

    cards, asked = settings.data, settings.evaluation

    def read(names: Sequence[str], split: str, limit: int, kinds, seed: int) -> list[Example]:
        rows = []
        for name in names:
            if split == "train" and data.role(name, split) != "train":
                raise InputError(f"data: {name} has no split to train on; its card says why")
            part = split
            if split == "test" and split not in data.card(name)["splits"]:
                part = "validation"
                print(f"{name}: it has no test split, evaluated on validation")
            found = data.load(
                name, part, data_dir, allow_changed=cards.allow_changed, seed=seed,
                columns=cards.columns, whole=not data.halved(name, cards),
            )  # fmt: skip
            if name == "general_instructions":
                found = instructions.constrain(found, seed, kinds)
            found = [
                e for e in found
                if e.task != "instruction" or any(c["kind"] in kinds for c in e.constraints[:1])
            ]  # fmt: skip
            rows += found[:limit] if limit else found
        return rows

    limits, seed = cards.limits, settings.run.seed
    sft = read(cards.sft, "train", limits.sft, instructions.SEEN, seed)
    # Another draw than SFT's: on the very questions it was tuned on a model errs too seldom.
    grpo = read(cards.grpo, "train", limits.grpo, instructions.SEEN, seed + 1)
    # Seed 0 whatever the run's seed: every run answers the same held-out prompts.
    held_out = read(cards.evaluate, asked.split, limits.evaluate, instructions.KINDS, 0)
    questions, general = axes(held_out)
    kept = _some(questions, asked.questions) + _some(general, asked.instructions)
    rows = {"sft": sft, "grpo": grpo, "held_out": [held_out[i] for i in kept]}
    data.refuse_shared(sft + grpo, held_out)
    if own := dict.fromkeys(e for e in sft + grpo if data.is_own(e.source)):
        print(contamination.said([*own], data_dir))
    for stage, found in rows.items():
        if not found and stage != "held_out" and getattr(settings, stage).steps:
            said = f"no rows; name a card with a training split or set {stage}.steps=0"
            raise InputError(f"data.{stage}: {said}")
        rewards.validate(e for e in found if e.task != "instruction")
    rewards.validate_own(settings.grpo.rewards, grpo)
    return rows


def axes(rows: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Places of the questions, and of the general instructions."""
    general = {i for i, e in enumerate(rows) if e.task == "instruction"}
    return [i for i in range(len(rows)) if i not in general], sorted(general)


def _some(rows: list[int], most: int) -> list[int]:
    """At most so many of the rows, the same at every call, in their order; 0: all."""
    if not most or len(rows) <= most:
        return rows
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), most))]


def execute(
    run: record.Run, settings: Settings, rows: dict, stages: Sequence[str], data_dir, offline: bool
) -> None:
    """Carry out the stages in an open run folder; finished ones are skipped, begun ones go on."""
    with held_back():
        import torch

        from bbkit import data, models, prompts, rewards
        from bbkit.data import broad
        from bbkit.runs import elsewhere, report

    # Said even where it is the default: it makes MKL keep to that number, which it may else lower
    # while it runs, and a product summed by another number of threads differs in its last bits.
    torch.set_num_threads(settings.run.threads or torch.get_num_threads())
    rows = rows | {"ifeval": [], "elsewhere": []}
    if most := settings.evaluation.ifeval:
        told = data.load("ifeval", "test", data_dir, allow_changed=settings.data.allow_changed)
        rows["ifeval"] = told[:most]
    chosen = rewards.chosen(settings.grpo.rewards)  # once: the files may be edited meanwhile
    run.pin(rewards=functions.checksums(settings.grpo.rewards))
    model, tokenizer = models.load(settings.model, offline=offline)
    with held_back():  # not before: unsloth, where it loads, comes before transformers and TRL
        from bbkit.runs.callback import Recorder

    named = {*settings.data.sft, *settings.data.grpo, *filter(data.is_own, settings.data.evaluate)}
    names = sorted(n for n in named if data_dir or data.is_own(n))
    sums = {n: data.checksums(n, "train", data_dir) for n in names}
    run.pin(prompt_hash=prompts.prompt_hash(), data=sums, model=model.origin)
    if "evaluate" in stages:
        rows["elsewhere"] = elsewhere.texts(settings, data_dir)

    def evaluate_stage(stage: str) -> None:
        if run.writes and "evaluate" in stages and not run.is_done(f"evaluate {stage}"):
            evaluate_model(run, stage, model, tokenizer, rows, settings, chosen)

    asked = {s for s in ("sft", "grpo") if s in stages and getattr(settings, s).steps}
    left = {s for s in asked if not run.is_done(s)}
    guarded = {*settings.retention.stages} if settings.retention.rule != "none" else set()
    kept: list[Reply] = []
    if left & (guarded | ({"sft"} if settings.sft.replay else set())):  # before any LoRA
        tests = [*rows["held_out"], *rows["ifeval"], *rows["elsewhere"]]
        file = run.folder / "replies.jsonl"
        kept = broad.of_run(file, model, tokenizer, settings, tests, data_dir)
    evaluate_stage("base")
    model = models.add_lora(model, settings.model, settings.run.seed)
    tuned = False
    for stage in STAGES[:2]:
        if run.is_done(stage):  # whatever the stages asked for: the next ones go on from it
            models.load_adapter(model, run.folder / stage / "adapter")
        elif stage in left:
            hooks = Recorder(run, stage, settings)
            train_stage(hooks, model, tokenizer, rows[stage], kept, chosen)
        else:
            continue
        tuned = True
        evaluate_stage(stage)
    if run.writes:
        if tuned:
            models.save_adapter(model, run.folder / "adapter")
        print(f"report: {report.write(run.folder)}")


def train_stage(
    hooks, model, tokenizer, rows: Sequence[Example], kept: Sequence[Reply], chosen: dict
) -> None:
    """Train the adapter on the rows of the stage of `hooks`, from its newest checkpoint; save it.

    `hooks` are a bbkit.runs.callback.Recorder, `kept` the base's replies, `chosen` the rewards.
    """
    from bbkit import grpo, models, sft

    run, stage, settings = hooks.run, hooks.stage, hooks.settings
    section, folder = getattr(settings, stage), run.folder / stage
    if stage == "sft":
        trainer = sft.build(model, tokenizer, rows, settings, folder, [hooks], kept)
    else:
        asked, general = ([rows[i] for i in part] for part in axes(rows))
        shape = (section.steps, section.prompts, section.instruction_share, settings.run.seed)
        order = grpo.schedule(asked, general, *shape)
        trainer = grpo.build(model, tokenizer, order, settings, folder, [hooks], kept, chosen)
    hooks.train(trainer)
    if stage == "sft":
        models.average_with_base(model, section.averaging)
    if run.writes:
        models.save_adapter(model, folder / "adapter")
    run.done(stage, seconds=hooks.seconds, peak_gib=hooks.peak_gib)


def evaluate_model(run, stage, model, tokenizer, rows, settings, chosen) -> None:
    """Evaluate the model as it is, write one row per reply and the measures with intervals."""
    from tqdm import tqdm

    from bbkit import evaluate
    from bbkit.machine import generation, memory
    from bbkit.runs import elsewhere, measures, report

    section, held_out, ifeval = settings.evaluation, rows["held_out"], rows["ifeval"]
    run.forget_held_out(stage)
    memory.forget_peak()
    began = time.perf_counter()
    with tqdm(total=len(held_out) + len(ifeval), desc=f"evaluate {stage}", file=sys.stdout) as bar:
        how = (section.batch_tokens, bar.update)
        replies = generation.generate(model, tokenizer, held_out, section.max_new_tokens, *how)
        found = evaluate.items(held_out, replies, chosen)
        if ifeval:
            replies = generation.generate(model, tokenizer, ifeval, section.ifeval_tokens, *how)
            found += evaluate.ifeval_items(ifeval, replies)
        if stage != "base":
            told = [i for part in axes(held_out) for i in _some(part, KL_PROMPTS)]
            prompts, said = [held_out[i] for i in told], [found[i]["reply"] for i in told]
            values = generation.divergence(model, tokenizer, prompts, said)
            for i, value in zip(told, values, strict=True):
                found[i]["kl"] = value
    texts = elsewhere.measured(model, tokenizer, rows["elsewhere"], settings.model.max_length)
    folder = run.folder / "evaluation"
    folder.mkdir(exist_ok=True)
    files.write_rows(folder / f"{stage}.jsonl", found + texts)
    trained = rows["sft"] + rows["grpo"]  # `majority` must know all that training shows
    written, draws = report.item_rows(run.folder), section.bootstrap
    run.evaluation({
        stage: measures.summary(found + texts, draws),
        "baseline": evaluate.baselines(trained, held_out, draws),
        "difference": measures.changes(written, draws),
        "kl": measures.divergences(written, draws),
    })  # fmt: skip
    step = 0 if stage == "base" else getattr(settings, stage).steps
    for item in [r for r in found if r["task"] != "instruction"][:3] + found[-2:]:
        shown = {"prompt": item["question"], "reply": item["reply"], "gold": item["gold"]}
        run.sample(stage, step, shown | {"rewards": item["scores"]}, held_out=True)
    spent = time.perf_counter() - began
    run.done(f"evaluate {stage}", seconds=spent, peak_gib=memory.peak_gib())


if __name__ == "__main__":
    sys.exit(main())
