"""From the Gramian of the capabilities' gradients to the update, and bounds on the step it makes.

Serves the claim of gradient orthogonality: the neighbours that the paper is to be measured against
(PCGrad, MGDA, UPGrad, Aligned-MTL: TorchJD's weightings) and our reading of it, projection
of the preferred sum onto the dual cone; and the same for a step that an optimiser has made.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from bbkit import CannotRun, InputError
from bbkit.config import Combination

COMBINATIONS = get_args(Combination)


def combine(gramian: Tensor, method: str, preference: Sequence[float] | Tensor | None = None):
    """Coefficients c (K,) of the update Σ_k c_k g_k, from the Gramian (K, K) alone.

    `preference` (K,) weighs the gradients (default: 1/K each). `dual_cone` projects the preferred
    sum onto the cone that opposes no gradient, `upgrad` each gradient by itself; `mgda` and
    `random`, a placebo, take only its sum. A gradient that is 0 keeps its preference and takes no
    part; with a Gramian that is not finite the answer is the preference. All but `sum` are
    TorchJD's weightings (arXiv 2406.16232 and the works it cites).

    >>> conflict = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    >>> [round(c, 3) for c in combine(conflict, "dual_cone", [1.0, 0.0]).tolist()]
    [1.0, 0.5]
    """
    if method not in COMBINATIONS:
        raise InputError(f"combination {method!r}: use one of {', '.join(COMBINATIONS)}")
    matrix = gramian.detach().double().cpu()
    count = len(matrix)
    given = [1 / count] * count if preference is None else preference
    wanted = torch.as_tensor(given, dtype=torch.float64).cpu()
    if wanted.shape != (count,) or not (wanted >= 0).all() or not wanted.sum() > 0:
        raise InputError(f"combination: preference {given} is not {count} weights of 0 or more")
    coefficients = wanted.clone()
    sizes = matrix.diagonal()
    if method != "sum" and torch.isfinite(matrix).all():
        live = sizes > 1e-12 * sizes.max()
        if (live & (wanted > 0)).any():
            coefficients[live] = _weights(matrix[live][:, live], method, wanted[live])
    return coefficients.to(gramian)


def _weights(matrix: Tensor, method: str, wanted: Tensor) -> Tensor:
    from torchjd import aggregation
    from torchjd.linalg import QuadprogProjector

    # The cone does not depend on the length of its rows, but TorchJD's projector takes a trace
    # below 1e-4 for 0, as that of a GRPO gradient is, and lets go of a short row beside long ones.
    # So it sees unit rows, and none of the negative eigenvalues that rounding leaves.
    norm = matrix.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(matrix / torch.outer(norm, norm))
    unit = (vectors * values.clamp(min=0.0)) @ vectors.T
    cones = {"dual_cone": aggregation.DualProjWeighting, "upgrad": aggregation.UPGradWeighting}
    if method in cones:
        projector = QuadprogProjector(norm_eps=0.0, reg_eps=1e-9)
        return cones[method](wanted * norm, projector)(unit) / norm
    free = wanted > 0  # a preference of 0 has no part in what only weighs gradients
    part, weights = matrix[free][:, free] / norm.max() ** 2, wanted[free]
    scaled = part * torch.outer(weights, weights)  # of the weighted gradients w_k g_k
    if method == "random":
        chosen = aggregation.RandomWeighting()(part) * weights.sum()
    elif method == "aligned_mtl":
        chosen = aggregation.AlignedMTLWeighting(weights)(part)
    elif method == "pcgrad":
        chosen = aggregation.PCGradWeighting()(scaled) * weights
    else:
        chosen = aggregation.MGDAWeighting(1e-6, 200)(part) * weights.sum()
    coefficients = torch.zeros_like(wanted)
    coefficients[free] = chosen
    return coefficients


def nearest(gramian: Tensor, slopes: Tensor, bounds: Tensor) -> tuple[Tensor, float]:
    """How much of each row to take out of a displacement Δ, so that ⟨g_j, Δ⟩ ≤ b_j.

    `gramian` (R, R) is ⟨g_j, S g_k⟩ in the metric S of the step, `slopes` (R,) are ⟨g_j, Δ⟩,
    `bounds` (R,) b. Returns μ (R,), for which Δ − S Gᵀμ is the displacement nearest to Δ in S⁻¹
    that keeps every bound, and what is left: 0, or where the bounds contradict one another the
    least violation of them (least squares over rows of length 1, of the largest need), which the
    step then has. A row of 0 bounds nothing. Least-distance programming (Lawson and Hanson 1974,
    chapter 23) by quadprog.

    >>> one = torch.ones(1, 1)
    >>> nearest(one, torch.tensor([0.75]), torch.tensor([0.5]))[0].tolist()
    [0.25]
    """
    import quadprog
    from scipy.optimize import nnls

    matrix, removed = gramian.double().cpu(), torch.zeros(len(gramian), dtype=torch.float64)
    need = slopes.double().cpu() - bounds.double().cpu()  # what each row must lose
    sizes = matrix.diagonal()
    live = (sizes > 1e-24 * sizes.max()) & need.isfinite()
    if not (live & (need > 0)).any() or not matrix.isfinite().all():
        return removed, 0.0
    norm = sizes[live].sqrt()
    # In the space that the rows span: Δ moves by −Σ z_i e_i, row j loses (A z)_j, and |z| is how
    # far. Unit rows, since a long one beside a short one would decide what counts as rounding.
    values, vectors = torch.linalg.eigh(matrix[live][:, live] / torch.outer(norm, norm))
    kept = values > 1e-12 * values.max()
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    lose = (vectors * roots).numpy()
    wanted = (need[live] / norm).numpy()
    scale = abs(wanted).max()
    wanted = wanted / scale
    left, size = 0.0, lose.shape[1]
    solve = partial(quadprog.solve_qp, np.eye(size), np.zeros(size), lose.T.copy())
    try:
        found = solve(wanted)[0]
    except ValueError:  # contradictory: first the least violation, then the nearest that has it
        parts = np.concatenate([lose, -lose, -np.eye(len(lose))], axis=1)
        best, left = nnls(parts, wanted)
        try:
            found = solve(parts @ best - 1e-9)[0]
        except ValueError:  # quadprog finds some of these contradictory too
            found = solve(parts @ best - 1e-6)[0]
    removed[live] = scale * (vectors / roots) @ torch.from_numpy(found) / norm
    return removed, float(left)


def inner(rows: Tensor, others: Tensor, scale: Tensor | None = None) -> Tensor:
    """(J, K) inner products ⟨g_j, S h_k⟩ of rows (J, P) and (K, P), S = diag(scale) or identity.

    In pieces of the rows' precision, summed in float64: all in float64 took ten times as long.
    """
    total = torch.zeros(len(rows), len(others), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], 2**16):
        part = slice(start, start + 2**16)
        scaled = rows[:, part] if scale is None else rows[:, part] * scale[part]
        total += scaled @ others[:, part].T
    return total.cpu()


def gramian(gradients: Tensor, scale: Tensor | None = None) -> Tensor:
    """(K, K) inner products of rows (K, P) with one another, as `inner`; see `adam_scale`."""
    total = inner(gradients, gradients, scale)
    return (total + total.T) / 2


def adam_scale(optimizer, parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """D⁻¹ (P,) of Adam, 1 / (√v̂ + ε) from its second moments as they are now; None before any.

    Raises CannotRun for an optimiser without them, such as SGD and those with 8-bit states.
    """
    group, parts = optimizer.param_groups[0], []
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
    lacking = CannotRun(f"metric adam: {kind} keeps no float second moments of Adam")
    if "betas" not in group:
        raise lacking
    for parameter in parameters:
        state = optimizer.state.get(parameter)
        if not state:  # it has never moved
            parts.append(torch.zeros_like(parameter).flatten())
        elif "exp_avg_sq" not in state or state["exp_avg_sq"].shape != parameter.shape:
            raise lacking
        else:
            corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            parts.append(1 / (corrected.sqrt() + group["eps"]).flatten())
    scale = torch.cat(parts)
    return scale if scale.any() else None


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
        made = self._place() - self.start
        slopes = kept = inner(matrix, made[None])[:, 0]
        bounded = [name for name, (_, bound) in rows.items() if bound < float("inf")]
        if bounded:  # else it is only measured
            kept = self._bound(matrix, bounds, made, slopes, "retention" in bounded)
        for name, before, after in zip(rows, slopes.tolist(), kept.tolist(), strict=True):
            self.note(f"{name}/slope", before)
            self.note(f"{name}/slope_kept", after)

    def _bound(
        self, matrix: Tensor, bounds: Tensor, made: Tensor, slopes: Tensor, keeps: bool
    ) -> Tensor:
        """Move the parameters to the nearest place within the bounds; the slopes from there."""
        metric = self._metric()
        products = gramian(matrix, metric)
        removed, left = nearest(products, slopes, bounds)
        if removed.any():
            change = removed.to(matrix) @ matrix * metric
            sizes = [p.numel() for p in self.parameters]
            places = (self.start + (made - change)).split(sizes)
            for p, place in zip(self.parameters, places, strict=True):
                p.copy_(place.view_as(p))
            slopes = inner(matrix, (self._place() - self.start)[None])[:, 0]
        length = (made.square() / metric.clamp(min=1e-30)).double().sum().item()
        if length > 0:
            cut = (removed @ products @ removed).clamp(min=0).item()
            self.note(f"{'retention' if keeps else 'step'}/cut", (cut / length) ** 0.5)
        if left > 1e-6:
            self._say("limits: bounds that contradict one another; the least violation is taken")
        return slopes

    def _metric(self) -> Tensor:
        try:
            scale = adam_scale(self.optimizer, self.parameters)
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
