"""What per-capability gradients cost: ratios to plain TRL, measured in one process, interleaved.

`python -m bbkit.benchmark` prints a table and writes JSON. Serves the claim that Capability-Aware
GRPO comes at no cost. Each round runs every variant once, in a new order, from the same seed;
figures are medians over rounds of the ratio to the plain variant of the same round, so that a
machine that others use too disturbs both alike. `--retention`: what keeping the base costs instead.
"""

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from bbkit import config, files, gpu, record
from bbkit.errors import CannotRun, InputError, exit_code
from bbkit.variants import VARIANTS

WORDS = "fever cough rash virus worm liver blood skin lung bone".split()


def parser() -> argparse.ArgumentParser:
    """The options of `python -m bbkit.benchmark`."""
    p = argparse.ArgumentParser(
        prog="python -m bbkit.benchmark", description=__doc__.split("\n")[0]
    )
    p.add_argument("--preset", default="pocket", help="model and adapter: one of the presets")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one key of it")
    p.add_argument("--capabilities", type=int, nargs="+", default=[2, 4, 8], metavar="K")
    p.add_argument("--rank", type=int, nargs="+", default=[8, 64], help="of the LoRA matrices")
    p.add_argument("--sequences", type=int, default=8, help="per micro-batch")
    p.add_argument("--tokens", type=int, default=128, help="per sequence, half of them completion")
    p.add_argument("--prompts", type=int, default=2, help="of a whole step: the kit's questions")
    p.add_argument("--generations", type=int, default=4, help="completions of each of them")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON with every figure")
    p.add_argument("--retention", action="store_true", help="steps with it and without, no others")
    p.add_argument("--replies", type=int, nargs="+", default=[8, 32], help="of the base, per step")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="upstream data files, where needed")
    p.add_argument("--peak", help=argparse.SUPPRESS)  # of what: a process of its own
    p.add_argument("--kept", type=Path, help=argparse.SUPPRESS)  # its file of replies
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _main(args, words))


def _main(args: argparse.Namespace, words: list[str]) -> int:
    if args.retention:
        from bbkit import retention_cost

        return retention_cost.run(args)
    if args.peak:
        print(_peak(args))
        return 0
    completions = args.prompts * args.generations
    if completions % args.sequences:
        raise InputError(f"--sequences {args.sequences} must divide a step's {completions}")
    rows = []
    head = ["model", "K", "rank", "variant", "backward", "forward+backward", "step", "+generation"]
    print(" | ".join([*head, "peak MB"]), flush=True)
    for rank in args.rank:
        for count in args.capabilities:
            settings = _settings(args, rank)
            model, tokenizer = lora_model(settings)
            found = backward_ratios(model, count, args.sequences, args.tokens, args.rounds)
            steps = step_ratios(model, tokenizer, count, args)
            for variant in VARIANTS:
                row = {"model": settings.model.name, "capabilities": count, "rank": rank}
                row |= {"variant": variant, **found[variant], **steps.get(variant, {})}
                row["backend"] = model.get_base_model().origin["backend"]
                row["peak_bytes"] = _variant_peak(args, rank, count, variant)
                rows.append(row)
                cells = [row.get(k) for k in ("backward", "both", "step", "step_with_generation")]
                shown = ["-" if c is None else f"{c:.3f}" for c in cells]
                peak = f"{row['peak_bytes'] / 1e6:,.0f}"
                name = Path(settings.model.name).name
                print(" | ".join([name, str(count), str(rank), variant, *shown, peak]), flush=True)
    if backend_beside(args):
        rows += _with_unsloth(words, rows)
    write(args, rows)
    return 0


def backend_beside(args: argparse.Namespace) -> bool:
    """Whether unsloth gets rows of its own: it is here, a GPU is, and no backend was asked for."""
    import torch

    asked = any(item.startswith("model.backend") for item in args.set)
    there = importlib.util.find_spec("unsloth") is not None
    return torch.cuda.is_available() and there and not asked


def _with_unsloth(words: list[str], ours: list[dict]) -> list[dict]:
    """The same rows by unsloth, from a process that imports it first; printed, with their ratios
    to `ours`, which are by transformers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        more = ["--set", "model.backend=unsloth", "--out", str(out)]
        done = subprocess.run([sys.executable, "-m", "bbkit.benchmark", *words, *more])
        if done.returncode:
            print(f"unsloth: no rows, its process ended with exit code {done.returncode}")
            return []
        rows = files.read_json(out)["rows"]
    for a, b in zip(rows, ours, strict=True):
        if "seconds" in a:
            shape = f"K {a['capabilities']}, rank {a['rank']}, {a['variant']}"
            print(f"step by unsloth / by transformers, {shape}: {a['seconds'] / b['seconds']:.3f}")
    return rows


def write(args: argparse.Namespace, rows: list[dict]) -> None:
    """The figures with arguments and machine as JSON, where `--out` asks for it."""
    if args.out:
        facts = {"rows": rows, "arguments": vars(args), "machine": record.machine()}
        files.write_bytes(args.out, json.dumps(facts, indent=1, default=str).encode())


def backward_ratios(
    model, capabilities: int, sequences: int, tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Per variant median ratios to plain: {"backward"} alone, {"both"} with the forward part.

    One micro-batch of random tokens; the terms are mean log-likelihoods of the second half.
    """
    ids, weights = _batch(model, sequences, tokens, capabilities)
    seconds: dict[str, list[tuple[float, float]]] = {v: [] for v in VARIANTS}
    for turn in range(rounds + 1):
        for variant in random.Random(turn).sample(sorted(VARIANTS), len(VARIANTS)):
            with _autocast(model):
                times = VARIANTS[variant](model, ids, weights)
            if turn:  # the first round warms up
                seconds[variant].append(times)
    return {
        variant: {
            "backward": ratio([t[1] for t in times], [t[1] for t in seconds["plain"]]),
            "both": ratio([sum(t) for t in times], [sum(t) for t in seconds["plain"]]),
        }
        for variant, times in seconds.items()
    }


def _batch(model, sequences: int, tokens: int, capabilities: int):
    """Random tokens and the weight of each sequence in each capability, on the model's device."""
    import torch

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (sequences, tokens), generator=draw)
    weights = torch.randn(sequences, capabilities, generator=draw)
    return ids.to(model.device), weights.to(model.device)


def _autocast(model):
    """What a real run computes in: 16 bit by autocast where the kit's trainers would."""
    import torch

    from bbkit.sft import precision

    on = precision(model)
    if not (on["bf16"] or on["fp16"]):
        return nullcontext()
    return torch.autocast(model.device.type, torch.bfloat16 if on["bf16"] else torch.float16)


def ratio(some: Sequence[float], plain: Sequence[float]) -> float:
    """Median over rounds of what `some` took to what `plain` took in the same round."""
    return statistics.median(a / b for a, b in zip(some, plain, strict=True))


def step_ratios(
    model, tokenizer, capabilities: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """The same for whole optimiser steps of TRL's trainer and of the capability-aware one.

    {"step"} without, {"step_with_generation"} with sampling the completions, which the
    capability-aware trainer does by bbkit.sampling: the same ones, from the same seed. The latter
    in {"seconds"} too, the median.
    """
    import torch
    from trl import GRPOTrainer

    from bbkit.capability import capability_aware

    class Timed(GRPOTrainer):
        """Counts the seconds that sampling and scoring take."""

        def _generate_and_score_completions(self, inputs):
            start = gpu.now()
            found = super()._generate_and_score_completions(inputs)
            self.sampling = gpu.now() - start
            return found

    made: dict[str, Any] = {"plain": Timed, "one_pass": capability_aware(Timed)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            n: _trainer(c, model, tokenizer, capabilities, args, folder) for n, c in made.items()
        }
        for turn in range(args.rounds + 1):
            for name in random.Random(turn).sample(sorted(trainers), len(trainers)):
                torch.manual_seed(turn)
                whole = step(trainers[name])
                if turn:
                    seconds[name].append((whole - trainers[name].sampling, whole))
    plain = seconds["plain"]
    return {
        name: {
            "step": ratio([t[0] for t in times], [t[0] for t in plain]),
            "step_with_generation": ratio([t[1] for t in times], [t[1] for t in plain]),
            "seconds": statistics.median(t[1] for t in times),
        }
        for name, times in seconds.items()
    }


def _trainer(made, model, tokenizer, capabilities: int, args: argparse.Namespace, folder: str):
    from datasets import Dataset
    from trl import GRPOConfig

    from bbkit import prompts, questions
    from bbkit.adapters import keep_float32
    from bbkit.sft import precision

    def reward(word: str):
        def share(completions, **_):
            texts = [c[0]["content"] for c in completions]
            return [text.count(word[0]) / (1 + len(text)) for text in texts]

        share.__name__ = word
        return share

    rewards = [reward(WORDS[k % len(WORDS)]) for k in range(capabilities)]
    passes = args.prompts * args.generations // args.sequences
    arguments = GRPOConfig(
        output_dir=folder, max_steps=1, per_device_train_batch_size=args.sequences,
        num_generations=args.generations, max_completion_length=args.tokens // 2,
        gradient_accumulation_steps=passes, steps_per_generation=passes,
        **precision(model), report_to="none", beta=0.0, loss_type="dapo",
        gradient_checkpointing=False, learning_rate=1e-6,
    )  # fmt: skip
    asked = questions.ontology("train")
    rows = Dataset.from_list([{"prompt": prompts.messages(e)} for e in asked])
    with keep_float32(model):
        trainer = made(
            model=model, reward_funcs=rewards, args=arguments, train_dataset=rows,
            processing_class=tokenizer,
        )  # fmt: skip
    return ready(trainer)


def ready(trainer):
    """A trainer with the optimiser and the micro-batches of one step, for `step`."""
    passes = trainer.args.gradient_accumulation_steps
    trainer.create_optimizer_and_scheduler(1)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)  # with float16's scaler
    trainer.current_gradient_accumulation_steps = passes
    trainer.batches = list(islice(trainer.get_train_dataloader(), passes))
    return trainer


def step(trainer) -> float:
    """Seconds of one optimiser step, as transformers' own loop makes it."""

    trainer._metrics["train"].clear()
    start = gpu.now()
    for i, batch in enumerate(trainer.batches, 1):
        trainer.accelerator.gradient_state._set_sync_gradients(i == len(trainer.batches))
        trainer.training_step(trainer.model, batch, None)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return gpu.now() - start


def _settings(args: argparse.Namespace, rank: int):
    fixed = ["model.backend=transformers", *args.set]  # `auto` may be either; `backend_beside`
    return config.load(args.preset, None, [*fixed, f"model.lora_rank={rank}"])


def lora_model(settings):
    """A model with its LoRA matrices, in training mode, and its tokenizer."""
    from bbkit import adapters, models

    model, tokenizer = models.load(settings.model, say=lambda line: None, offline=True)
    return adapters.add_lora(model, settings.model, 0).train(), tokenizer


def _peak(args: argparse.Namespace) -> int:
    """Most bytes in use while one variant runs once."""
    model, _ = lora_model(_settings(args, args.rank[0]))
    ids, weights = _batch(model, args.sequences, args.tokens, args.capabilities[0])
    with _autocast(model):
        return peak_of(lambda: VARIANTS[args.peak](model, ids, weights))


def peak_of(run: Callable[[], Any]) -> int:
    """Most bytes in use while it runs (bbkit.memory.peak_bytes)."""
    from bbkit import memory

    memory.forget_peak()  # of what was loaded before
    run()
    return memory.peak_bytes()


def _variant_peak(args: argparse.Namespace, rank: int, capabilities: int, variant: str) -> int:
    options = ["--peak", variant, "--rank", str(rank), "--capabilities", str(capabilities)]
    options += ["--sequences", str(args.sequences), "--tokens", str(args.tokens)]
    return peak_apart(args, options)


def peak_apart(args: argparse.Namespace, options: Sequence[str]) -> int:
    """The peak in a process of its own: a peak never comes down again."""
    command = [sys.executable, "-m", "bbkit.benchmark", "--preset", args.preset]
    command += [f"--set={item}" for item in args.set]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or f"ended by signal {-done.returncode}; too little memory?"
        raise CannotRun(f"benchmark: {options}: {said.splitlines()[-1]}")
    return int(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
