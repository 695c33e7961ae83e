"""The dynamic hybrid reward: weights of the capabilities, re-balanced once per generation.

Serves the claim that a dynamic reward beats a static one. The paper says "adaptively balances" and
no more: `deficit` is our reading, the others are published neighbours. Weights lie on the simplex,
each above a floor. Rewards are logged raw, the weights beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from bbkit import InputError
from bbkit.config import Advantages

SCHEMES = get_args(Advantages)
EPSILON = 1e-4  # TRL's, added to a standard deviation


@dataclass(frozen=True)
class Stats:
    """What a controller sees of one step: lists over the K capabilities, None where absent."""

    reward: Sequence[float | None]  # mean raw reward
    sigma: Sequence[float | None]  # mean in-group standard deviation
    covariance: Sequence[float | None]  # mean in-group covariance with the weighted reward
    gramian: Sequence[Sequence[float]] | None = None  # inner products of the last step's gradients


def statistics(rewards: Tensor, generations: int, weights: Sequence[float]) -> Stats:
    """`Stats` of raw rewards (N, K), NaN where a capability does not apply, in groups in a row.

    >>> s = statistics(torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, torch.nan], [0.0, torch.nan]]),
    ...     generations=2, weights=[0.5, 0.5])
    >>> s.reward, s.covariance
    ([0.25, 1.0], [0.125, 0.0])
    """
    grouped = _grouped(rewards, generations)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    total = (centred.nan_to_num() * torch.tensor(weights).to(rewards)).sum(dim=2, keepdim=True)
    return Stats(
        _known(rewards.nanmean(dim=0)),
        _known(_spread(grouped).squeeze(1).nanmean(dim=0)),
        _known((centred * total).nanmean(dim=1).nanmean(dim=0) * generations / (generations - 1)),
    )


def advantages(
    rewards: Tensor,
    generations: int,
    weights: Sequence[float],
    scheme: str = "capability",
    floor: float = 0.1,
) -> Tensor:
    """Advantages (N, K) of raw rewards (N, K): A with Σ_k w_k A_ik the advantage of the scheme.

    `capability`: (r − μ_k) / max(σ_k, floor), so that a reward which is nearly settled is not blown
    up to unit scale. `gdpo` (arXiv 2601.05242): (r − μ_k) / σ_k, whitened over the batch. `grpo`:
    (r − μ_k) / σ_R with R = Σ w_k r_k. `dr_grpo` (arXiv 2503.20783): r − μ_k. NaN, a capability
    that does not apply, gets 0 (in `grpo`, beside others in its group, it counts as a reward of 0,
    as in TRL). Raises InputError for an infinite reward, naming its column.

    >>> advantages(torch.tensor([[1.0, 0.52], [0.0, 0.50]]), 2, [0.5, 0.5])[0]
    tensor([0.7071, 0.1000])
    """
    if scheme not in SCHEMES:
        raise InputError(f"advantages {scheme!r}: use one of {', '.join(SCHEMES)}")
    if torch.isinf(rewards).any():
        row, column = torch.nonzero(torch.isinf(rewards))[0].tolist()
        raise InputError(
            f"reward {column} of completion {row} is infinite; return a finite number, or None "
            "where it does not apply"
        )
    weighing = torch.tensor(weights).to(rewards)
    grouped = _grouped(rewards, generations)
    if scheme == "grpo":  # as TRL: beside another reward None counts as 0
        grouped = grouped.where(grouped.isnan().all(dim=2, keepdim=True), grouped.nan_to_num())
    found = grouped - grouped.nanmean(dim=1, keepdim=True)
    if scheme == "capability":
        found = found / _spread(grouped).clamp(min=floor)
    elif scheme == "gdpo":
        found = found / (_spread(grouped) + EPSILON)
    elif scheme == "grpo":
        total = (grouped.nan_to_num() * weighing).sum(dim=2, keepdim=True)
        total[grouped.isnan().all(dim=2)] = torch.nan
        found = found / (_spread(total) + EPSILON)
    found = found.nan_to_num(nan=0.0).flatten(0, 1)
    if scheme == "gdpo":  # its batch mean is 0 already
        total = (found @ weighing)[~rewards.isnan().all(dim=1)]
        found = found / (total.std() + EPSILON) if len(total) > 1 else found
    return found


def _grouped(rewards: Tensor, generations: int) -> Tensor:
    if generations < 2 or len(rewards) % generations:
        raise InputError(
            f"{len(rewards)} completions in groups of {generations}: whole groups of 2 or more"
        )
    return rewards.view(-1, generations, rewards.shape[1])


def _spread(grouped: Tensor) -> Tensor:
    """In-group standard deviation (groups, 1, K), as TRL takes it; NaN where unknown."""
    count = (~grouped.isnan()).sum(dim=1, keepdim=True)
    deviation = grouped - grouped.nanmean(dim=1, keepdim=True)
    spread = (deviation.square().nansum(dim=1, keepdim=True) / (count - 1)).sqrt()
    return spread.masked_fill(count < 2, torch.nan)


def _known(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values.tolist()]


@dataclass
class Controller:
    """Weights of K capabilities; `update` moves them by one step, `state` and `restore` keep them.

    >>> controller = CONTROLLERS["deficit"]([1.0, 1.0], rate=1.0)
    >>> seen = Stats(reward=[0.9, 0.1], sigma=[0.1, 0.1], covariance=[0.0, 0.0])
    >>> [round(w, 2) for w in controller.update(seen)]
    [0.31, 0.69]
    """

    rule: Callable
    preference: Sequence[float]  # (K,) weights at the start, and for good with `fixed`
    rate: float = 0.1  # size of a step
    ema: float = 0.9  # memory of the averages
    target: float = 1.0  # what a reward, or its covariance with the sum, should reach
    floor: float = 0.05  # least weight, but of a capability that starts at 0: that is off for good

    def __post_init__(self) -> None:
        start, total = self.preference, sum(self.preference)
        if min(start) < 0 or not 0 < total < math.inf:
            below = "none below 0 (of what is to fall, return the negative), and not all 0"
            raise InputError(f"weights {list(start)}: {below}")
        if not 0 <= self.floor * len(start) < 1:
            raise InputError(f"weight floor {self.floor}: below 1/{len(start)}")
        self.floors = [self.floor if w and self.rule is not fixed else 0.0 for w in start]
        self.weights = self._above_floor([w / total for w in start])
        self.averages: list[float | None] = [None] * len(start)
        self.said = False

    def update(self, stats: Stats) -> list[float]:
        """The weights after one more step; they sum to 1."""
        off = [r for r in stats.reward if r is not None and not 0 <= r <= 1]
        if self.rule is deficit and off and not self.said:
            self.said = True
            mend = "scale that reward, or set controller='fixed'"
            print(f"a mean reward of {off[0]:.3g}: deficit is made for [0, 1]; {mend}")
        found = self.rule(self, stats) or [0.0] * len(self.weights)
        powers = [p * (w > 0) for p, w in zip(found, self.preference, strict=True)]
        if sum(powers) > 0 and all(map(math.isfinite, powers)):
            self.weights = self._above_floor([p / sum(powers) for p in powers])
        return self.weights

    def average(self, values: Sequence[float | None]) -> list[float | None]:
        """Exponential averages, begun with the first value; an absent one leaves its own as is."""
        for k, value in enumerate(values):
            if value is not None:
                before = self.averages[k]
                before = value if before is None else before
                self.averages[k] = self.ema * before + (1 - self.ema) * value
        return self.averages

    def lag(self, values: Sequence[float | None]) -> list[float]:
        """How far each average is below the target; 0 where there is none."""
        return [0.0 if a is None else self.target - a for a in self.average(values)]

    def raised(self, exponents: Sequence[float]) -> list[float]:
        """w_k · exp(rate · exponent_k), up to one factor for all."""
        top = max(exponents)  # against overflow
        pairs = zip(self.weights, exponents, strict=True)
        return [w * math.exp(self.rate * (e - top)) for w, e in pairs]

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, as JSON."""
        return {"weights": list(self.weights), "averages": list(self.averages)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`. InputError for one of another number of capabilities."""
        if len(state["averages"]) != len(self.weights):
            said = f"{len(state['averages'])} rewards, not {len(self.weights)}"
            raise InputError(f"weights: the checkpoint is of {said}; start anew")
        self.averages = list(state["averages"])
        if self.rule is not fixed:  # the preference may be another one now
            self.weights = list(state["weights"])

    def _above_floor(self, weights: list[float]) -> list[float]:
        """Weights below the floor are raised to it, the others share what is left."""
        low: set[int] = set()
        while True:
            left = 1 - sum(self.floors[k] for k in low)
            rest = sum(w for k, w in enumerate(weights) if k not in low)
            found = [self.floors[k] if k in low else left * w / rest for k, w in enumerate(weights)]
            below = {k for k, w in enumerate(found) if w < self.floors[k]} - low
            if not below:
                return found
            low |= below


def fixed(controller: Controller, stats: Stats) -> None:
    """The static hybrid reward: weights as they are preferred."""


def deficit(controller: Controller, stats: Stats) -> list[float]:
    """w_k ∝ w_k · exp(rate · (target − average reward)): what lags gets more. Our reading."""
    return controller.raised(controller.lag(stats.reward))


def variance(controller: Controller, stats: Stats) -> list[float] | None:
    """w_k ∝ average in-group spread: what still varies gets more (DVAO, arXiv 2605.25604)."""
    spread = [s for s in controller.average(stats.sigma) if s is not None]
    return spread if len(spread) == len(controller.weights) else None


def covariance(controller: Controller, stats: Stats) -> list[float]:
    """log w_k += rate · relu(target − average cov(r_k, w·r)) (CTWA, arXiv 2602.06869)."""
    return controller.raised([max(0.0, lag) for lag in controller.lag(stats.covariance)])


def agreement(controller: Controller, stats: Stats) -> list[float] | None:
    """log w_k += rate · Σ_j ⟨g_k, g_j⟩ / mean_j |g_j|² (arXiv 2509.11452): favours what agrees.

    Their μ is here the mean squared norm, so that the rate has no unit.
    """
    if stats.gramian is None:
        return None
    size = sum(row[k] for k, row in enumerate(stats.gramian)) / len(stats.gramian)
    return controller.raised([sum(row) / size for row in stats.gramian]) if size > 0 else None


RULES = (fixed, deficit, variance, covariance, agreement)
CONTROLLERS = {rule.__name__: partial(Controller, rule) for rule in RULES}
