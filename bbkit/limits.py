"""Bounds on the step that an optimiser really takes: orthogonality where it counts.

Serves the claims of gradient orthogonality and of no alignment tax. A gradient that opposes nothing
is not enough: momentum and second moments turn it, and 30 % of GRPO's Adam steps raised the loss
that their gradient was made not to raise. So the displacement is projected, after the optimiser.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bbkit import combination, gradients
from bbkit.errors import CannotRun

FLOOR = 0.01  # of √v̂; pocket's runs end with their least at 0.035, so that it binds in odd ones


class Limits:
    """What the next step of an optimiser may not do, on the displacement that it really makes.

    After the optimiser, its momentum, decay and all, the parameters are moved to the nearest place
    at which every row g that was added keeps ⟨g, Δ⟩ ≤ its bound. Nearest is meant in the metric of
    the optimiser, Adam's 1/(√v̂ + ε) after its update with √v̂ no less than `FLOOR` of its root mean
    square, else Euclidean, which is said. `note(name, value)` gets by row the slope that the
    optimiser's displacement had, and the one taken; and the share of it that was cut, as
    `retention/cut` where a row of that name was bounded, else as `step/cut`.
    """

    def __init__(self, parameters: Iterable[Parameter], note: Callable[[str, float], Any]):
        self.parameters, self.note = list(parameters), note
        self.rows: dict[str, tuple[Tensor, float]] = {}
        self.start = torch.empty(0)  # where the parameters were before the step
        self.optimizer: Any = None
        self.said: set[str] = set()

    def add(self, name: str, row: Tensor, bound: float) -> None:
        """Bound ⟨row, Δ⟩ of the next step; `row` (P,) over the parameters, flattened in order."""
        self.rows[name] = (row, bound)

    def watch(self, optimizer) -> None:
        """Hook into the steps of an optimiser, accelerate's wrapper or torch's own, once."""
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner is not self.optimizer:
            self.optimizer = inner
            inner.register_step_pre_hook(self._before)
            inner.register_step_post_hook(self._after)

    def _place(self) -> Tensor:
        return torch.cat([p.detach().flatten().float() for p in self.parameters])

    def _before(self, *_) -> None:
        if self.rows:
            self.start = self._place()

    @torch.no_grad()
    def _after(self, *_) -> None:
        rows, self.rows = self.rows, {}
        skipped = getattr(self.optimizer, "found_inf", None)  # a fused one skips within its step
        if not rows or (skipped is not None and skipped.item()):
            return
        matrix = torch.stack([row for row, _ in rows.values()])
        bounds = torch.tensor([bound for _, bound in rows.values()])
        made, metric = self._place() - self.start, self._metric()
        slopes = gradients.inner(matrix, made[None])[:, 0]
        gramian = gradients.gramian(matrix, metric)
        removed, left = combination.nearest(gramian, slopes, bounds)
        kept = slopes
        if removed.any():
            change = removed.to(matrix) @ matrix * metric
            sizes = [p.numel() for p in self.parameters]
            places = (self.start + (made - change)).split(sizes)
            for p, place in zip(self.parameters, places, strict=True):
                p.copy_(place.view_as(p))
            kept = gradients.inner(matrix, (self._place() - self.start)[None])[:, 0]
        for name, before, after in zip(rows, slopes.tolist(), kept.tolist(), strict=True):
            self.note(f"{name}/slope", before)
            self.note(f"{name}/slope_kept", after)
        length = (made.square() / metric.clamp(min=1e-30)).double().sum().item()
        bounded = [name for name, (_, bound) in rows.items() if bound < float("inf")]
        if bounded and length > 0:
            cut = (removed @ gramian @ removed).clamp(min=0).item()
            kind = "retention" if "retention" in bounded else "step"
            self.note(f"{kind}/cut", (cut / length) ** 0.5)
        if left > 1e-6:
            self._say("limits: bounds that contradict one another; the least violation is taken")

    def _metric(self) -> Tensor:
        try:
            scale = gradients.adam_scale(self.optimizer, self.parameters)
        except CannotRun:
            scale = None
        if scale is None:
            kind = type(self.optimizer).__name__
            self._say(f"limits: steps are kept in plain distance, {kind} has no float moments")
            return torch.ones_like(self.start)
        # Where hardly any gradient ever came, moving would cost nothing: the correction would go
        # there, as far as rounding says, and two processes would end up 100 times further apart.
        moved = scale > 0
        mean = (1 / scale[moved]).square().mean().sqrt()
        return torch.where(moved, scale.clamp(max=1 / (FLOOR * mean)), scale)

    def _say(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            print(line)
