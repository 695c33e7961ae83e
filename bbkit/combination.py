"""From the Gramian of the capabilities' gradients to the coefficients of the update.

Serves the claim of gradient orthogonality: the neighbours that the paper is to be measured against
(PCGrad, MGDA, UPGrad, Aligned-MTL: TorchJD's weightings) and our reading of it, projection
of the preferred sum onto the dual cone; and the same for a step that an optimiser has made.
"""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from bbkit.config import Combination
from bbkit.errors import InputError

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
    count, left = lose.shape[1], 0.0
    try:
        found = quadprog.solve_qp(np.eye(count), np.zeros(count), lose.T.copy(), wanted)[0]
    except ValueError:  # contradictory: first the least violation, then the nearest that has it
        parts = np.concatenate([lose, -lose, -np.eye(len(lose))], axis=1)
        best, left = nnls(parts, wanted)
        wanted = parts @ best - 1e-9
        found = quadprog.solve_qp(np.eye(count), np.zeros(count), lose.T.copy(), wanted)[0]
    removed[live] = scale * (vectors / roots) @ torch.from_numpy(found) / norm
    return removed, float(left)
