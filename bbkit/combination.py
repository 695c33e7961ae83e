"""From the Gramian of the capabilities' gradients to the coefficients of the update.

Serves the claim of gradient orthogonality: the neighbours that the paper is to be measured against
(PCGrad, MGDA, CAGrad, UPGrad, Aligned-MTL: TorchJD's weightings) and our reading of it, projection
of the preferred sum onto the dual cone, with constraints that want nothing for themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bbkit.errors import CannotRun, InputError

COMBINATIONS = ("sum", "pcgrad", "mgda", "cagrad", "upgrad", "aligned_mtl", "dual_cone", "random")


def combine(gramian: Tensor, method: str, preference: Sequence[float] | Tensor | None = None):
    """Coefficients c (K,) of the update Σ_k c_k g_k, from the Gramian (K, K) alone.

    `preference` (K,) weighs the gradients (default: 1/K each); one of 0 marks a gradient that
    only constrains, such as retention: the update must not oppose it. `dual_cone` projects the
    preferred sum onto the cone that opposes no gradient, `upgrad` each gradient by itself;
    `mgda` and `random`, a placebo, take only its sum. A gradient that is 0 keeps its preference and
    takes no part; with a Gramian that is not finite the answer is the preference. All but `sum` and
    the last step are TorchJD's weightings (arXiv 2406.16232 and the works it cites).

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
    if torch.isfinite(matrix).all():
        live = sizes > 1e-12 * sizes.max()
        if (live & (wanted > 0)).any():
            coefficients[live] = _weights(matrix[live][:, live], method, wanted[live])
    return coefficients.to(gramian)


def _weights(matrix: Tensor, method: str, wanted: Tensor) -> Tensor:
    from scipy.optimize import nnls
    from torchjd import aggregation
    from torchjd.linalg import QuadprogProjector

    # The cone does not know how long its rows are, but solvers do: TorchJD's projector takes a
    # trace below 1e-4 for 0 and projects nothing, and a GRPO gradient is that small; its
    # regularisation would let go of a short row beside long ones. So they see unit rows, and no
    # negative eigenvalue, which rounding leaves in a float32 Gramian of parallel rows.
    norm = matrix.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(matrix / torch.outer(norm, norm))
    unit = (vectors * values.clamp(min=0.0)) @ vectors.T
    projector = QuadprogProjector(norm_eps=0.0, reg_eps=1e-9)
    if method == "dual_cone":
        return aggregation.DualProjWeighting(wanted * norm, projector)(unit) / norm
    if method == "upgrad":
        return aggregation.UPGradWeighting(wanted * norm, projector)(unit) / norm
    free = wanted > 0
    part, weights = matrix[free][:, free] / norm.max() ** 2, wanted[free]
    scaled = part * torch.outer(weights, weights)  # of the weighted gradients w_k g_k
    if method == "sum":
        chosen = weights
    elif method == "random":
        chosen = aggregation.RandomWeighting()(part) * weights.sum()
    elif method == "aligned_mtl":
        chosen = aggregation.AlignedMTLWeighting(weights)(part)
    elif method == "pcgrad":
        chosen = aggregation.PCGradWeighting()(scaled) * weights
    elif method == "mgda":
        chosen = aggregation.MGDAWeighting(1e-6, 200)(part) * weights.sum()
    else:
        try:
            chosen = aggregation.CAGradWeighting(c=0.5)(scaled / scaled.diagonal().sum()) * weights
        except ImportError as error:
            raise CannotRun(f"combination cagrad: {error}") from error
        chosen = chosen * len(weights)
    coefficients = torch.zeros_like(wanted)
    coefficients[free] = chosen
    if not free.all():  # A-GEM's projection: the nearest update that opposes no constraint
        bound = ~free
        root = torch.linalg.cholesky(unit[bound][:, bound] + 1e-12 * torch.eye(int(bound.sum())))
        against = unit[bound] @ (coefficients * norm).unsqueeze(1)
        inner = torch.linalg.solve_triangular(root, against, upper=False)[:, 0]
        pushed = torch.from_numpy(nnls(root.T.numpy(), -inner.numpy())[0])
        coefficients[bound] = pushed / norm[bound]
    return coefficients
