"""Capability-aware GRPO around TRL's GRPOTrainer, or unsloth's, with any reward functions.

Serves the claims on Capability-Aware GRPO, the dynamic hybrid reward and gradient orthogonality:
one advantage and one gradient per reward, weights that a controller moves, and a combination that
keeps the capabilities from hurting one another. The paper gives no formulas: this is our reading.
"""

import math
import random
import time
from collections import defaultdict, namedtuple
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from itertools import count
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from bbkit import CannotRun, InputError, gradients, weighting
from bbkit.combination import COMBINATIONS, Limits, adam_scale, combine, gramian
from bbkit.config import Metric
from bbkit.machine import sampling

if TYPE_CHECKING:
    from trl import GRPOTrainer as Trainer
else:
    Trainer = object  # the class is put before a trainer's, which unsloth replaces on import

METRICS = get_args(Metric)
TRL = "1.14.2"  # pinned, and known to work; tests/test_newest_trl.py tries the newest
# What the class below takes over from the trainer's, and what it reads there.
JOINTS = (
    "_generate_single_turn", "_calculate_rewards", "_generate_and_score_completions",
    "compute_loss", "training_step", "reward_weights", "reward_func_names", "num_generations",
    "num_iterations", "loss_type", "beta", "aux_loss_enabled", "_entropy_bonus_enabled", "_metrics",
)  # fmt: skip
Asked = namedtuple("Asked", "advantages sigma_floor controller combination metric control")


class Balance(TrainerCallback, ExportableState):
    """Keeps the weights of the rewards in each checkpoint's trainer_state.json, to go on from."""

    def __init__(self, trainer):
        self.trainer = trainer

    def state(self) -> dict:
        seen = {"controller": self.trainer.controller.state(), "gramian": self.trainer.gramian}
        return {"args": {}, "attributes": seen}

    def restore(self, state: dict) -> None:
        """Go on from a `state`; so too where a step was broken off after its weights had moved."""
        self.trainer.controller.restore(state["attributes"]["controller"])
        self.trainer.gramian = state["attributes"]["gramian"]

    def on_train_begin(self, args, state, control, **_):
        self.restore(state.stateful_callbacks.get("Balance", self.state()))


def capability_aware(
    base: type,
    advantages: str = "capability",
    sigma_floor: float = 0.1,
    controller: str = "deficit",
    combination: str = "dual_cone",
    metric: str = "euclidean",
    **control: float,
) -> type:
    """A subclass of `base`, a GRPOTrainer, that is built and used as `base` is.

    Each reward function is a capability; `args.reward_weights` is the preference. Each step goes
    from rewards to weights (`weighting.CONTROLLERS`, its options in `control`), to advantages
    (`weighting.advantages`), to one gradient per capability (`gradients`), to their combination
    (`combination.combine`, inner products `euclidean` or as `adam` steps). With metric `step` the
    weighted sum goes to the optimiser, and the step that it makes of it is moved to the nearest
    that lowers no capability to first order (`bbkit.combination`): the dual cone, of the step.
    Raises InputError for an unknown name, and when built for a loss that cannot be told apart.
    """
    for what, name, known in (
        ("advantages", advantages, weighting.SCHEMES),
        ("controller", controller, weighting.CONTROLLERS),
        ("combination", combination, COMBINATIONS),
        ("metric", metric, METRICS),
    ):
        if name not in known:
            raise InputError(f"{what} {name!r}: use one of {', '.join(known)}")
    if metric == "step" and combination != "dual_cone":
        raise InputError(f"metric step: is the dual cone's, not {combination}'s; set dual_cone")
    asked = Asked(advantages, sigma_floor, controller, combination, metric, control)
    return type("CapabilityAware", (CapabilityAware, base), {"asked": asked})


class CapabilityAware(Trainer):
    """GRPO with a gradient per capability; `capability_aware` puts it before a trainer's class."""

    asked: Asked
    model: Any  # this and the next are the trainer's
    num_generations: int

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        theirs = super()  # the class alone: a method of ours is no sign of one under it
        if gone := [n for n in JOINTS if not (n in vars(self) or hasattr(theirs, n))]:
            raise CannotRun(
                f"capability-aware GRPO: {type(self).__mro__[2].__name__} of trl "
                f"{metadata.version('trl')} has no {', '.join(gone)}; trl {TRL} is known to work"
            )
        names = self.reward_func_names
        for i, name in enumerate(names):
            if name in names[:i]:  # metrics of both would be one
                names[i] = next(new for n in count(2) if (new := f"{name}_{n}") not in names)
                print(f"reward {i} is logged as {names[i]}: an earlier one is named {name} too")
        start = self.reward_weights.tolist()
        self.controller = weighting.CONTROLLERS[self.asked.controller](start, **self.asked.control)
        self.capabilities = len(start)
        self.gramian: list | None = None  # of the last step's capabilities
        self.micro_batches: list[dict] = []  # of this step so far
        self.observed: dict[str, Tensor] | None = None  # {}: keep each step's gradients here
        # Rows: the capabilities, then what belongs to none and stays as it is, where there is such:
        # KL penalty, entropy bonus, a router's auxiliary loss.
        self.rest = bool(self.beta or self._entropy_bonus_enabled or self.aux_loss_enabled)
        self.capture = gradients.Capture(self.model, self.capabilities + self.rest)
        self.limits: Any = None
        if self.asked.combination != "sum":  # does the step do what the sum of gradients would?
            self.limits = Limits(self.capture.parameters.values(), self._note)
        linear = self.loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
        self.gradient_engine = "one_pass" if linear and self.num_iterations == 1 else "replay"
        if self.gradient_engine == "replay":
            print("gradient engine replay: this loss is not linear in the advantages")
        elif fused := gradients.unfuse(self.model):
            print(f"gradient engine one_pass: PEFT's forwards, not {fused} fused kernels")
        self.add_callback(Balance(self))

    def _generate_single_turn(self, *args, **kwargs):
        model = self.accelerator.unwrap_model(self.model)
        # In the precision of the loss: the policy that samples is the one that is trained.
        with sampling.one_prefill_a_prompt(model), self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        groups = self.num_generations if self.model.training else 1  # an evaluation has others
        if found.shape[1:] != (self.capabilities,) or len(found) % groups:
            raise CannotRun(
                f"capability-aware GRPO: rewards are {tuple(found.shape)} in trl "
                f"{metadata.version('trl')}, not (completions, {self.capabilities}); trl {TRL} is "
                "known to work"
            )
        self.raw_rewards = found
        if self.model.training:
            seen = weighting.statistics(found, groups, self.controller.weights)
            weights = self.controller.update(replace(seen, gramian=self.gramian))
            self.reward_weights = torch.tensor(weights).to(self.reward_weights)
            for k, name in enumerate(self.reward_func_names):
                if (sigma := seen.sigma[k]) is not None:
                    self._note(f"sigma/{name}", sigma)
                self._note(f"weight/{name}", weights[k])
        return found

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            found = weighting.advantages(
                self.raw_rewards, self.num_generations, self.controller.weights,
                self.asked.advantages, self.asked.sigma_floor,
            )  # fmt: skip
            count = len(output["advantages"])
            start = count * self.accelerator.process_index
            output["capability_advantages"] = found[start : start + count]
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        columns = inputs.get("capability_advantages")
        if columns is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.micro_batches.append(inputs)
        one_pass, ones = self.gradient_engine == "one_pass", torch.ones_like(columns[:, 0])
        passes = [(ones, False)] if one_pass else [(a, False) for a in columns.T]
        if self.rest:  # a pass of its own, into the last row
            passes.append((0 * ones, True))
        value = 0.0
        for i, (weights, rest) in enumerate(passes):
            last = i == len(passes) - 1
            loss = self._loss(inputs | {"advantages": weights}, rest, mute=not last)
            value = value + loss.detach() * (1.0 if rest else self._worth(i, inputs, columns))
            if one_pass:
                self.capture.next(pad(columns * (not rest), (0, int(self.rest)), value=float(rest)))
            if not last:
                self.accelerator.backward(loss)
                if not one_pass:
                    self.capture.take(i)
        return loss + (value - loss).detach()  # the slope of the last pass, the value of all

    def _loss(self, inputs, rest: bool, mute: bool):
        """TRL's loss, of the bare model: DDP would sum up gradients that nobody asked for."""
        names = ("beta", "_entropy_bonus_enabled", "aux_loss_enabled", "_metrics")
        kept = {name: getattr(self, name) for name in names}
        if not rest:
            self.beta, self._entropy_bonus_enabled, self.aux_loss_enabled = 0.0, False, False
        if mute:  # each call would log once more
            self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        loss = super().compute_loss(self.accelerator.unwrap_model(self.model), inputs)
        vars(self).update(kept)
        return loss

    def _worth(self, i: int, inputs, columns) -> Any:
        """What the value of pass i counts for in the loss that is logged, GRPO's own."""
        if self.gradient_engine == "replay":
            return self.controller.weights[i]
        total = columns @ torch.tensor(self.controller.weights).to(columns)
        alike = self.loss_type == "grpo"  # else a sequence counts by its tokens
        share = torch.ones_like(total) if alike else inputs["completion_mask"].sum(1)
        return (total * share).sum() / share.sum()

    def training_step(self, model, inputs, num_items_in_batch=None):
        one_pass = self.gradient_engine == "one_pass"
        with gradients.watch(self.model, self.capture) if one_pass else nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
        if one_pass and self.capture.missed:
            missed = self.capture.missed
            print(f"gradient engine replay: {len(missed)} matrices missed, first {missed[0]}")
            self.gradient_engine = "replay"
            self.capture.clear()
            self.model.zero_grad()
            again, self.micro_batches = self.micro_batches, []
            for inputs in again:
                with self.compute_loss_context_manager():
                    self.accelerator.backward(self.compute_loss(model, inputs))
                self.capture.take(-1)
        elif not one_pass:
            self.capture.take(-1)  # of the last pass, which the trainer itself has sent back
        if self.accelerator.sync_gradients:
            began = time.perf_counter()
            self._combine()
            self.capture.clear()
            self.micro_batches = []
            self._note("seconds/combination", time.perf_counter() - began)
        return loss

    def _combine(self) -> None:
        """Put the combined gradient where the optimiser reads it, and log its parts."""
        capture, kinds, names = self.capture, self.capabilities, self.reward_func_names
        rows = capture.gradients
        if self.accelerator.num_processes > 1:
            rows.copy_(self.accelerator.reduce(rows, "mean"))
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler else 1.0  # of float16's loss
        rows /= scale
        inverse = None
        if self.asked.metric == "adam":
            try:
                inverse = adam_scale(self.optimizer, capture.parameters.values())
            except CannotRun as error:
                print(f"{error}; inner products are plain")
                self.asked = self.asked._replace(metric="euclidean")
        products = gramian(rows[:kinds], inverse)
        if scaler and not products.isfinite().all():  # overflowed: the scaler leaves it out
            capture.put(torch.ones(len(capture)))
            return
        # PCGrad draws an order, the same on every rank, and the CPU draws it: torch.manual_seed
        # would begin each GPU's numbers anew too, from which the completions are drawn.
        with torch.random.fork_rng(devices=[]):
            name = f"combination/{self.args.seed}/{self.state.global_step}"
            torch.default_generator.manual_seed(random.Random(name).getrandbits(63))
            method = "sum" if self.asked.metric == "step" else self.asked.combination
            found = combine(products, method, self.controller.weights)
        coefficients = pad(found, (0, len(capture) - kinds), value=1.0)  # that of the rest stays 1
        capture.put(coefficients * scale)
        if self.asked.combination != "sum":  # limits alone may be retention's
            self.limits.watch(self.optimizer)
            bound = 0.0 if self.asked.metric == "step" else math.inf  # else it is only measured
            for name, row in zip(names, rows, strict=False):
                self.limits.add(f"step/{name}", row.clone(), bound)
        cosines = gradients.cosines(products)
        for j, name in enumerate(names):
            self._note(f"coefficient/{name}", found[j].item())
            self._note(f"gradient_norm/{name}", rows[j].norm().item())
            for k in range(j):
                self._note(f"cosine/{names[k]}/{name}", cosines[k, j].item())
        self.gramian = products.tolist()
        if self.observed is not None:
            self.observed = {n: r.clone() for n, r in zip(names, rows, strict=False)}

    def _note(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)
