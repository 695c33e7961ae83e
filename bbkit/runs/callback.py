"""What a trainer tells the run folder: metrics, samples, whole checkpoints, and a progress bar.

Serves no claim by itself. Both trainers get this one callback; it also decides from where a stage
goes on, and how it ends when a person or the scheduler of a cluster stops it.
"""

import math
import pickle
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm  # text, in notebooks too: a static viewer shows where it ended
from transformers import PrinterCallback, TrainerCallback

from bbkit import InputError, Unhealthy, models
from bbkit.config import Settings
from bbkit.machine import files, memory, processes
from bbkit.runs import health, record

# TRL counts tokens from 0 again after a resume; a step tells more than an epoch.
LEFT_OUT = ("epoch", "num_tokens")
SKIPPED = 20  # a scale of 65,536, halved so often, is 1/16


class Recorder(TrainerCallback):
    """Trainer callback: metrics and samples into the run folder, whole checkpoints, a progress bar.

    SIGINT and SIGTERM end training with a checkpoint of the last whole step; `train` then raises
    KeyboardInterrupt. The step in hand is given up, since it may take minutes; several processes
    end it, since none may leave the others alone in it. A loss or gradient that is not finite
    raises Unhealthy; float16 alone finds the scale of its loss by gradients that overflow, in steps
    that are skipped, and raises it after SKIPPED of them in a row.
    """

    def __init__(self, run: record.Run, stage: str, settings: Settings):
        self.run, self.stage, self.settings = run, stage, settings
        self.steps = getattr(settings, stage).steps
        self.stop, self.seconds, self.peak_gib, self.saved = False, 0.0, 0.0, time.monotonic()
        self.skipped = 0  # steps in a row that float16's scaler has left out
        self.midway = False  # in a step, of which nothing has reached the weights yet
        self.whole: Callable[[], None] | None = None  # brings back the end of the last step
        self.rows: list[dict[str, Any]] = []
        self.told: set[str] = set()
        self.trainer: Any = None
        self.bar: Any = None

    def train(self, trainer) -> None:
        """Train, from the newest whole checkpoint of the stage if there is one."""
        folder = self.run.folder / self.stage
        checkpoint = files.latest_checkpoint(folder)
        start = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        if checkpoint:
            print(f"{self.stage}: going on from step {start}")
        self.run.truncate(self.stage, start)
        if checkpoint and start >= self.steps:  # transformers would take one step more
            models.load_adapter(trainer.accelerator.unwrap_model(trainer.model), checkpoint)
            return
        self.trainer, self.saved = trainer, time.monotonic()
        trainer.remove_callback(PrinterCallback)  # a dict a step; the bar and metrics.jsonl say it
        kept = files.read_rows(self.run.folder / "metrics.jsonl")
        self.rows = [row for row in kept if row["stage"] == self.stage]
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        memory.forget_peak()
        began = time.perf_counter()
        try:
            bar = tqdm(total=self.steps, initial=start, desc=self.stage, file=sys.stdout)
            with bar as self.bar, files.guarded(folder):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            self._save_last_step()
            raise
        except pickle.UnpicklingError as error:  # transformers reads with weights_only
            said = "not the state of a trainer; remove it to go on without"
            raise InputError(f"{checkpoint}: {said}") from error
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
        self.seconds, self.peak_gib = time.perf_counter() - began, memory.peak_gib()
        if self.stop:
            raise KeyboardInterrupt

    def _stop(self, *_) -> None:
        self.stop = True
        if self.midway and processes.count() == 1:
            self.midway = False
            raise KeyboardInterrupt

    def _save_last_step(self) -> None:
        state = self.trainer.state
        name = f"checkpoint-{state.global_step}"
        if self.whole and files.broken(self.run.folder / self.stage / name):
            self.whole()
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            self.on_save(self.trainer.args, state, self.trainer.control)

    def on_step_begin(self, args, state, control, **_):
        self.midway = True
        if self.stop:
            self._stop()

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.midway = False

    def on_step_end(self, args, state, control, **_):
        self.whole = _as_now(self.trainer)
        seconds = 60 * self.settings.run.save_minutes
        due = 0 < seconds < time.monotonic() - self.saved
        accelerator = self.trainer.accelerator
        out = accelerator.scaler is not None and accelerator.optimizer_step_was_skipped
        self.skipped = self.skipped + 1 if out else 0
        if self.skipped >= SKIPPED:
            raise Unhealthy(
                f"{self.stage} step {state.global_step}: float16 has overflowed in {SKIPPED} steps "
                f"in a row; lower {self.stage}.learning_rate, or set model.dtype: float32"
            )
        self.stop, due = processes.in_any(self.stop, due)
        control.should_training_stop |= self.stop
        control.should_save |= self.stop or due
        self.bar.update(1)

    def on_save(self, args, state, control, **_):
        processes.wait()  # each writes the state of its own random numbers
        if self.run.writes:
            files.mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.saved = time.monotonic()

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in (logs or {}):
            return  # the summary at the end of training
        known = {k: v for k, v in logs.items() if k not in LEFT_OUT and v is not None}
        row: dict[str, Any] = {_key(k): float(v) for k, v in known.items()}
        if self.skipped:
            row = {k: v for k, v in row.items() if k == "loss" or math.isfinite(v)}
            row["skipped"] = float(self.skipped)
        for key in ("loss", "grad_norm"):
            if not math.isfinite(row.get(key, 0.0)):
                raise Unhealthy(
                    f"{self.stage} step {state.global_step}: {key} is {row[key]}; the last "
                    f"checkpoint is kept, lower {self.stage}.learning_rate and start a new run"
                )
        if self.stage == "grpo":
            row["gradient_engine"] = self.trainer.gradient_engine
        self.run.log(self.stage, state.global_step, row)
        self.rows.append(row)
        for name, line in health.signs(self.rows).items():
            if name not in self.told:
                self.told.add(name)
                self.bar.write(f"{self.stage} step {state.global_step}: {line}", file=sys.stdout)
        shown = {k.partition("/")[2]: f"{v:.2f}" for k, v in row.items() if k.startswith("reward/")}
        self.bar.set_postfix(shown or {"loss": f"{row['loss']:.2f}"})
        samples = getattr(self.trainer, "last_samples", [])
        for sample in samples[: self.settings.run.samples_per_log]:
            self.run.sample(self.stage, state.global_step, sample)


def _as_now(trainer) -> Callable[[], None]:
    """What brings random numbers and callbacks back to where they are now."""
    python, array = random.getstate(), np.random.get_state()
    cpu, gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    callbacks = [c for c in trainer.callback_handler.callbacks if hasattr(c, "restore")]
    kept = [callback.state() for callback in callbacks]

    def bring_back() -> None:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(gpus)
        for callback, state in zip(callbacks, kept, strict=True):
            callback.restore(state)

    return bring_back


def _key(name: str) -> str:
    """TRL's metric names as the run folder's contract has them."""
    if name.startswith("rewards/"):
        _, capability, kind = name.split("/")
        return f"reward/{capability}" if kind == "mean" else f"reward_spread/{capability}"
    return {"step_time": "seconds/step"}.get(name, name)
