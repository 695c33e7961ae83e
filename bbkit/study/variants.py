"""What a gradient per capability costs: passes and steps by each way to it beside plain TRL's.

Serves the claim that Capability-Aware GRPO comes at no cost. `plain` is what TRL does, one gradient
in all; `one_pass` is ours (`bbkit.gradients`); `replay`, a forward and a backward pass for each, is
what one would write without it; `autojac` is TorchJD's. A variant takes a model, token ids
(sequences, tokens) and the weight of every sequence in every capability (sequences, capabilities),
and returns the seconds of its backward passes, and with the forward ones.
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bbkit import config, gradients, prompts
from bbkit.data import catalogue
from bbkit.machine import gpu
from bbkit.models import keep_float32
from bbkit.sft import precision
from bbkit.study import timing

WORDS = "fever cough rash virus worm liver blood skin lung bone".split()


def rows(args: argparse.Namespace) -> list[dict]:
    """A row of figures for each rank, number of capabilities and variant; printed as a table."""
    head = ["model", "K", "rank", "variant", "backward", "forward+backward", "step", "+generation"]
    print(" | ".join([*head, "peak MB"]), flush=True)
    found = []
    for rank, count in product(args.rank, args.capabilities):
        settings = _settings(args, rank)
        model, tokenizer = timing.lora_model(settings, args.trains)
        passes = backward_ratios(model, count, args.sequences, args.tokens, args.rounds)
        steps = step_ratios(model, tokenizer, count, args)
        for variant in VARIANTS:
            row = {"model": settings.model.name, "trains": args.trains, "capabilities": count}
            row |= {"rank": rank, "variant": variant, **passes[variant], **steps.get(variant, {})}
            row["backend"] = model.origin["backend"]
            options = ["--peak", variant, "--rank", str(rank), "--capabilities", str(count)]
            row["peak_bytes"] = timing.peak_apart(args.words, options)
            found.append(row)
            cells = [row.get(k) for k in ("backward", "both", "step", "step_with_generation")]
            shown = ["-" if c is None else f"{c:.3f}" for c in cells]
            shown.append(f"{row['peak_bytes'] / 1e6:,.0f}")
            name = Path(settings.model.name).name
            print(" | ".join([name, str(count), str(rank), variant, *shown]), flush=True)
    return found


def peak(args: argparse.Namespace) -> int:
    """Most bytes in use while the variant `args.peak` runs once."""
    model, _ = timing.lora_model(_settings(args, args.rank[0]), args.trains)
    batch = random_batch(model, args.sequences, args.tokens, args.capabilities[0])
    return timing.peak_of(lambda: _once(args.peak, model, batch))


def _settings(args: argparse.Namespace, rank: int) -> config.Settings:
    fixed = ["model.backend=transformers", *args.set]  # `auto` may be either
    return config.load(args.preset, None, [*fixed, f"model.lora_rank={rank}"])


def backward_ratios(
    model, capabilities: int, sequences: int, tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Per variant median ratios to plain: {"backward"} alone, {"both"} with the forward part.

    One micro-batch of random tokens; the terms are mean log-likelihoods of the second half.
    """
    batch = random_batch(model, sequences, tokens, capabilities)
    took = timing.rounds(list(VARIANTS), rounds, lambda name, _: _once(name, model, batch))
    return timing.ratios(took, "backward", "both")


def random_batch(model, sequences: int, tokens: int, capabilities: int) -> tuple[Tensor, Tensor]:
    """Random tokens and the weight of each sequence in each capability, on the model's device."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (sequences, tokens), generator=draw)
    weights = torch.randn(sequences, capabilities, generator=draw)
    return ids.to(model.device), weights.to(model.device)


def _once(variant: str, model, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Run it in what a real run computes in: 16 bit by autocast where the kit's trainers would."""
    on = precision(model)
    half = torch.bfloat16 if on["bf16"] else torch.float16
    with torch.autocast(model.device.type, half) if on["bf16"] or on["fp16"] else nullcontext():
        return VARIANTS[variant](model, *batch)


def terms(model, ids: Tensor) -> Tensor:
    """The mean log-loss of the second half of each sequence: (sequences,)."""
    kept = ids.shape[1] // 2
    logits = model(input_ids=ids, logits_to_keep=kept + 1).logits[:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), ids[:, -kept:], reduction="none").mean(1)


def _timed(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], Any] = Tensor.backward
) -> tuple[float, float]:
    start = gpu.now()
    loss = forward()
    middle = gpu.now()
    backward(loss)
    end = gpu.now()
    return end - middle, end - start


@functools.lru_cache(maxsize=1)
def _capture(model, capabilities: int) -> gradients.Capture:
    """One for all rounds, as the trainer keeps one for all steps: new memory costs page faults."""
    return gradients.Capture(model, capabilities)


def _plain(model, ids, weights) -> tuple[float, float]:
    seconds = _timed(lambda: terms(model, ids).sum())
    model.zero_grad()
    return seconds


def _one_pass(model, ids, weights) -> tuple[float, float]:
    capture = _capture(model, weights.shape[1])
    with gradients.watch(model, capture):
        capture.next(weights)
        seconds = _plain(model, ids, weights)
    capture.gradients.sum()  # raises if a matrix was missed, whose cost would be left out
    capture.clear()
    return seconds


def _replay(model, ids, weights) -> tuple[float, float]:
    capture = _capture(model, weights.shape[1])
    backward = both = 0.0
    for k in range(weights.shape[1]):
        seconds = _timed(lambda k=k: weights[:, k] @ terms(model, ids))  # type: ignore[misc]
        capture.take(k)
        backward, both = backward + seconds[0], both + seconds[1]
    capture.clear()
    return backward, both


def _autojac(model, ids, weights) -> tuple[float, float]:
    from torchjd import autojac

    trainable = [p for p in model.parameters() if p.requires_grad]
    seconds = _timed(
        lambda: weights.T @ terms(model, ids),
        lambda losses: autojac.backward(losses, inputs=trainable, parallel_chunk_size=1),
    )
    for p in trainable:
        del p.jac
    return seconds


VARIANTS = {"plain": _plain, "one_pass": _one_pass, "replay": _replay, "autojac": _autojac}


def step_ratios(
    model, tokenizer, capabilities: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """The same for whole optimiser steps of TRL's trainer and of the capability-aware one.

    {"step"} without, {"step_with_generation"} with sampling the completions, which the
    capability-aware trainer does by bbkit.machine.sampling: the same ones, from the same seed. The
    latter in {"seconds"} too, the median.
    """
    from trl import GRPOTrainer

    from bbkit.capability import capability_aware

    class Timed(GRPOTrainer):
        """Counts the seconds that sampling and scoring take."""

        def _generate_and_score_completions(self, inputs):
            start = gpu.now()
            found = super()._generate_and_score_completions(inputs)
            self.sampling = gpu.now() - start
            return found

    def run(name: str, turn: int) -> tuple[float, float]:
        torch.manual_seed(turn)
        whole = timing.step(trainers[name])
        return whole - trainers[name].sampling, whole

    made: dict[str, Any] = {"plain": Timed, "one_pass": capability_aware(Timed)}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            n: _trainer(c, model, tokenizer, capabilities, args, folder) for n, c in made.items()
        }
        took = timing.rounds(list(made), args.rounds, run)
    found = timing.ratios(took, "step", "step_with_generation")
    for name, seconds in took.items():
        found[name]["seconds"] = statistics.median(whole for _, whole in seconds)
    return found


def _trainer(made, model, tokenizer, capabilities: int, args: argparse.Namespace, folder: str):
    """A trainer on the kit's questions, whose rewards are the shares of a letter in a reply."""
    from datasets import Dataset
    from trl import GRPOConfig

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
    asked = [{"prompt": prompts.messages(e)} for e in catalogue.load("ontology", "train")]
    with keep_float32(model):
        trainer = made(
            model=model, reward_funcs=rewards, args=arguments,
            train_dataset=Dataset.from_list(asked), processing_class=tokenizer,
        )  # fmt: skip
    return timing.ready(trainer)
