"""What retention costs: optimiser steps of the kit's own trainers with it and without.

Serves the claim of no alignment tax: what keeps the base must be cheap enough to leave on. Steps
have the shapes of the preset, real rows and replies, sampling included. All start at the same
weights, a little away from the base so that the rules have work to do, and from the same seed: they
draw the same completions.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch

from bbkit import CannotRun, InputError, config, grpo, sft, train
from bbkit.data import broad
from bbkit.study import timing

AWAY = 0.06  # spread of the B matrices: some 0.015 nats a token on pocket, 0.2 on SmolLM2
SHOWS = {"penalty": "retention/kl", "step": "retention/slope"}  # by what a rule shows that it ran
Variant = tuple[str, str, int]  # stage, rule, replies of the base that a step looks at


def rows(args: argparse.Namespace) -> list[dict]:
    """A row of figures for each stage, rule and number of replies; printed as a table."""
    print(" | ".join(["model", "stage", "rule", "replies", "step", "peak MB"]), flush=True)
    found, name = [], config.load(args.preset, None, args.set).model.name
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "replies.jsonl"
        for stage in ("sft", "grpo"):
            variants = [(stage, rule, count) for rule in SHOWS for count in args.replies]
            steps = step_ratios(args, [(stage, "none", 0), *variants], kept)
            for variant, figures in steps.items():
                options = ["--peak", "/".join(map(str, variant)), f"--kept={kept}"]
                peak = timing.peak_apart(args.words, options)
                row = dict(zip(("stage", "rule", "replies"), variant, strict=True))
                found.append({"model": name, **row, **figures, "peak_bytes": peak})
                cells = [*map(str, variant), f"{figures['step']:.3f}", f"{peak / 1e6:,.0f}"]
                print(" | ".join([Path(name).name, *cells]), flush=True)
    return found


def peak(args: argparse.Namespace) -> int:
    """Most bytes in use in one step of the variant `args.peak`, "stage/rule/replies"."""
    stage, rule, count = args.peak.split("/")
    [trainer] = _trainers(args, [(stage, rule, int(count))], args.kept).values()
    return timing.peak_of(lambda: _seconds(trainer, 1))


def step_ratios(
    args: argparse.Namespace, variants: list[Variant], kept: Path
) -> dict[Variant, dict[str, float]]:
    """Per variant the median ratio of a {"step"} to the first one's, and its median {"seconds"}."""
    trainers = _trainers(args, variants, kept)
    trained = [p for p in trainers[variants[0]].model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]

    def run(variant: Variant, turn: int) -> tuple[float]:
        took = _seconds(trainers[variant], turn)
        for p, value in zip(trained, start, strict=True):
            p.data.copy_(value)
        return (took,)

    took = timing.rounds(variants, args.rounds, run)
    found = timing.ratios(took, "step")
    for variant, seconds in took.items():
        found[variant]["seconds"] = statistics.median(whole for (whole,) in seconds)
    return found


def _seconds(trainer, turn: int) -> float:
    """Seconds of one step. Raises CannotRun where its rule did nothing: a ratio would hide that."""
    torch.manual_seed(turn)
    trainer.state.global_step = turn  # draws the replies
    noted: dict[str, Any] = getattr(trainer, "_noted", {})
    noted.clear()
    took = timing.step(trainer)
    rule = trainer.retention_rule
    if rule in SHOWS and not noted.keys() | trainer._metrics["train"].keys() >= {SHOWS[rule]}:
        raise CannotRun(f"benchmark: retention {rule}: a step ran without it")
    return took


def _trainers(args: argparse.Namespace, variants: list[Variant], kept: Path) -> dict[Variant, Any]:
    """The kit's own trainers of one model, whose replies are made once, in the file `kept`."""
    datasets.disable_progress_bars()  # they would run through the table
    fixed = [f"retention.replies={2 * max(args.replies)}", *args.set]
    fixed += ["sft.warmup_steps=0", "grpo.warmup_steps=0"]  # a first step that goes somewhere
    settings = config.load(args.preset, None, fixed)
    rows = train.load_rows(settings, args.data_dir)
    asked, general = ([rows["grpo"][i] for i in part] for part in train.axes(rows["grpo"]))
    order = grpo.schedule(
        asked, general, 1, settings.grpo.prompts, settings.grpo.instruction_share, settings.run.seed
    )
    model, tokenizer = timing.lora_model(settings)
    replies = broad.of_run(kept, model, tokenizer, settings, rows["held_out"], args.data_dir)
    if len(replies) < (most := max(count for *_, count in variants)):
        raise InputError(f"--replies {most}: there are {len(replies)} of the base")
    draw = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            p.data.copy_(AWAY * torch.randn(p.shape, generator=draw))
    made = {}
    for variant in variants:
        stage, rule, count = variant
        keys = [f"retention.rule={rule}", "retention.stages=[sft,grpo]"]
        keys += [f"retention.per_step={count}"] if rule in SHOWS else []
        own = config.load(args.preset, None, [*fixed, *keys])
        build, given = (sft.build, rows["sft"]) if stage == "sft" else (grpo.build, order)
        trainer = build(model, tokenizer, given, own, kept.parent, replies=replies)
        trainer.retention_rule = rule
        made[variant] = timing.ready(trainer)
    return made
