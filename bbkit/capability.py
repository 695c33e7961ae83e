"""Capability-aware GRPO around TRL's GRPOTrainer, or unsloth's, with any reward functions.

Serves the claims on Capability-Aware GRPO, the dynamic hybrid reward and gradient orthogonality, by
our reading: the paper gives no formulas. A step, in order: `_calculate_rewards` moves the weights,
`_generate_and_score_completions` adds an advantage per reward, `training_step` catches the
gradients of the passes that `compute_loss` makes of each micro-batch, and `_combine` makes one of
them for the optimiser, on whose step `Limits` looks.
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

from bbkit import CannotRun, InputError, gradients, weighting
from bbkit.combination import COMBINATIONS, Limits, adam_scale, combine, gramian
from bbkit.config import Metric
from bbkit.machine import sampling
from bbkit.machine.backward import Pass, replays
from bbkit.machine.balance import Balance

if TYPE_CHECKING:
    from trl import GRPOTrainer as Trainer
else:
    Trainer = object  # the class is put before a trainer's, which unsloth replaces on import

METRICS = get_args(Metric)
TRL = "1.14.2"  # pinned, and known to work; tests/test_newest_trl.py tries the newest
# Losses that multiply a sequence's term by its advantage, and clip it by the sign of that.
GATED = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo")
LEAST = 1e-3  # a weighted advantage nearer to 0 counts as this: its parts, unless 0, get divided
# What the class below takes over from the trainer's, and what it reads there.
JOINTS = (
    "_generate_single_turn", "_calculate_rewards", "_generate_and_score_completions",
    "compute_loss", "training_step", "reward_weights", "reward_func_names", "num_generations",
    "loss_type", "beta", "aux_loss_enabled", "_entropy_bonus_enabled", "_metrics",
)  # fmt: skip
Asked = namedtuple("Asked", "advantages sigma_floor controller combination metric control")


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

    Each reward function is a capability; `args.reward_weights` is the preference, and
    `args.scale_rewards` is not used. Each step goes from rewards to weights
    (`weighting.CONTROLLERS`, its options in `control`), to advantages (`weighting.advantages`), to
    one gradient per capability (`gradients`), to their combination (`combination.combine`, inner
    products `euclidean` or as `adam` steps). With metric `step` the optimiser gets the weighted
    sum, and its step is moved to the nearest that lowers no capability to first order: that cone.
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
    limits: Any = None

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
        self.checked = False  # the loss, for terms of its own
        self._capture_of(self.model)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise InputError("capability-aware GRPO: not with DeepSpeed or FSDP, which step apart")
        self.gradient_engine = "one_pass" if self.loss_type in GATED else "replay"
        if self.gradient_engine == "replay":
            print(f"gradient engine replay: loss_type {self.loss_type} is not known to be gated")
        elif fused := gradients.unfuse(self.model):
            print(f"gradient engine one_pass: PEFT's forwards, not {fused} fused kernels")
        self.add_callback(Balance(self))

    def _capture_of(self, model) -> None:
        """Of which parameters gradients are kept: anew where others train, as `model_init`'s do."""
        self.capture = gradients.Capture(model, self.capabilities + self.rest)
        if self.asked.combination != "sum":  # does the step do what the sum of gradients would?
            self.limits = Limits(self.capture.parameters.values(), self._note)

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
            ranks = found.split(len(output["advantages"]))
            output["capability_advantages"] = ranks[self.accelerator.process_index]
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        columns = inputs.get("capability_advantages")
        if columns is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.micro_batches.append(inputs)
        if not self.checked:
            self._refuse_other_terms(inputs)
        # The advantage of the weighted sum decides what is clipped, in all capabilities alike: at
        # it the terms are TRL's own, each of which a capability's share of it then multiplies.
        weights, one_pass = self.controller.weights, self.gradient_engine == "one_pass"
        whole = columns @ torch.tensor(weights).to(columns)
        whole = torch.where(whole.abs() < LEAST, (LEAST * columns.any(1)).copysign(whole), whole)
        passes = [Pass(whole, 0, 1.0, 1.0)]
        if not one_pass:
            passes = replays(columns, whole, weights, "old_per_token_logps" in inputs)
        if self.rest:  # a pass of its own, into the last row
            passes.append(Pass(0 * whole, self.capabilities, 1.0, 1.0))
        value, logged = torch.zeros_like(whole[0]), dict[str, list]()
        for i, (advantages, row, sign, counts) in enumerate(passes):
            last, rest = i == len(passes) - 1, row == self.capabilities
            loss, seen = self._loss(inputs | {"advantages": advantages}, rest)
            logged = seen | logged if rest else logged | seen  # of the rest its KL alone
            value = value + loss.detach() * counts
            if one_pass:
                shares = columns / whole.where(whole != 0, 1)[:, None] * (not rest)
                self.capture.next(pad(shares, (0, int(self.rest)), value=float(rest)))
            if not last:
                self.accelerator.backward(loss)
                if not one_pass:
                    self.capture.take(row, sign)
        for name, values in logged.items():
            self._metrics["train"][name] += values
        return loss + (value - loss).detach()  # the slope of the last pass, the value of all

    def _refuse_other_terms(self, inputs) -> None:
        """A term of the loss that no advantage multiplies would be weighed by them."""
        self.checked, none = True, torch.zeros_like(inputs["advantages"])
        with torch.no_grad(), torch.random.fork_rng([none.device] if none.is_cuda else []):
            left = self._loss(inputs | {"advantages": none}, rest=False)[0].item()
        if abs(left) > 1e-6:
            raise InputError(
                f"capability-aware GRPO: at advantages of 0 the loss is {left:.3g}: a term that no "
                "advantage multiplies would get lost; use another trainer"
            )

    def _loss(self, inputs, rest: bool) -> tuple[Tensor, dict[str, list]]:
        """TRL's loss and what it would log, of the bare model: DDP would sum up its gradients."""
        names = ("beta", "_entropy_bonus_enabled", "aux_loss_enabled", "_metrics")
        kept = {name: getattr(self, name) for name in names}
        if not rest:
            self.beta, self._entropy_bonus_enabled, self.aux_loss_enabled = 0.0, False, False
        self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        try:
            loss = super().compute_loss(self.accelerator.unwrap_model(self.model), inputs)
            return loss, dict(self._metrics["train"])
        finally:
            self.__dict__.update(kept)

    def training_step(self, model, inputs, num_items_in_batch=None):
        one_pass, known = self.gradient_engine == "one_pass", self.capture.parameters
        trains = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if trains.keys() != known.keys() or any(trains[n] is not p for n, p in known.items()):
            self._capture_of(self.model)
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
            weights = torch.tensor(self.controller.weights, dtype=products.dtype)
            found, asked = torch.zeros_like(weights), weights > 0  # the others are only logged
            found[asked] = combine(products[asked][:, asked], method, weights[asked])
        capture.put(scale * pad(found, (0, len(capture) - kinds), value=1.0))  # the rest stays 1
        if self.asked.combination != "sum":  # limits alone may be retention's
            self.limits.watch(self.optimizer)
            bound = 0.0 if self.asked.metric == "step" else math.inf  # else it is only measured
            for name, row, limited in zip(names, rows, asked, strict=False):
                if limited:
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
