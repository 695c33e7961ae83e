"""Variants timed side by side, and their peaks of memory: what `bbkit.benchmark` measures with.

Each round runs every variant once, in a new order, from the same seed; figures are medians over
rounds of the ratio to the first variant in the same round, so that a machine that others use too
disturbs both alike. A peak is measured in a process of its own: it never comes down again.
"""

import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from peft import get_peft_model

from bbkit import CannotRun, models
from bbkit.machine import gpu, memory

Name = TypeVar("Name")
Seconds = tuple[float, ...]


def rounds(
    names: Sequence[Name], count: int, run: Callable[[Name, int], Seconds]
) -> dict[Name, list[Seconds]]:
    """What `run(name, turn)` gave for each name in `count` rounds, after one that warms up."""
    found: dict[Name, list[Seconds]] = {name: [] for name in names}
    for turn in range(count + 1):
        for name in random.Random(turn).sample(names, len(names)):
            seconds = run(name, turn)
            if turn:
                found[name].append(seconds)
    return found


def ratios(took: Mapping[Name, list[Seconds]], *parts: str) -> dict[Name, dict[str, float]]:
    """By name {part: median over rounds}, in times of the first name's.

    >>> ratios({"plain": [(1.0, 2.0), (2.0, 2.0)], "ours": [(1.0, 4.0), (4.0, 4.0)]}, "one", "two")
    {'plain': {'one': 1.0, 'two': 1.0}, 'ours': {'one': 1.5, 'two': 2.0}}
    """
    plain = next(iter(took.values()))
    medians = {name: np.median(np.divide(rows, plain), axis=0) for name, rows in took.items()}
    return {name: dict(zip(parts, row.tolist(), strict=True)) for name, row in medians.items()}


def lora_model(settings, trains: str = "lora"):
    """A model in training mode, of which LoRA's matrices train, DoRA's too, or all weights.

    With it comes its tokenizer.
    """
    model, tokenizer = models.load(settings.model, say=lambda line: None, offline=True)
    if trains == "all":
        return model.requires_grad_(True).train(), tokenizer
    model = models.add_lora(model, settings.model, 0)
    if trains == "dora":
        asked: Any = model.peft_config["default"]
        asked.use_dora = True
        model = get_peft_model(model.unload(), asked)
    return model.train(), tokenizer


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


def peak_of(run: Callable[[], Any]) -> int:
    """Most bytes in use while it runs (bbkit.machine.memory.peak_bytes)."""
    memory.forget_peak()  # of what was loaded before
    run()
    return memory.peak_bytes()


def peak_apart(words: Sequence[str], options: Sequence[str]) -> int:
    """The bytes that `bbkit.benchmark` prints, told the same words and these options with --peak.

    Raises CannotRun where its process ends in an error, as one killed for memory does.
    """
    command = [sys.executable, "-m", "bbkit.benchmark", *words, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or f"ended by signal {-done.returncode}; too little memory?"
        raise CannotRun(f"benchmark: {options}: {said.splitlines()[-1]}")
    return int(done.stdout.strip().splitlines()[-1])
