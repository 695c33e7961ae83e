"""What the steps of a study did, from logs whose answer is known."""

import numpy as np

from bbkit.study import reasons

NAMES = ("a", "b", "c")


def logged(rows):
    """A run's log of steps with gradients `rows` (steps, 3, P), weights and coefficients."""
    log = {}
    for gradients, weights, coefficients in rows:
        norms = np.linalg.norm(gradients, axis=1)
        products = gradients @ gradients.T / np.outer(norms, norms)
        one = {f"gradient_norm/{n}": v for n, v in zip(NAMES, norms, strict=True)}
        one |= {f"weight/{n}": v for n, v in zip(NAMES, weights, strict=True)}
        one |= {f"coefficient/{n}": v for n, v in zip(NAMES, coefficients, strict=True)}
        one |= {f"cosine/{NAMES[i]}/{NAMES[j]}": products[i, j] for j in range(3) for i in range(j)}
        for name, value in one.items():
            log.setdefault(name, []).append(value)
    return log


def test_shares_of_steps_are_those_of_the_gradients():
    rng = np.random.default_rng(0)
    rows = [(rng.normal(size=(3, 4)) * [[1], [5], [0.2]], rng.random(3), rng.random(3))
            for _ in range(200)]  # fmt: skip
    rows = [(g, w, w if i % 4 else c) for i, (g, w, c) in enumerate(rows)]
    seen = reasons.by_step(logged(rows))
    for row, (g, w, c) in zip(seen, rows, strict=True):
        inner = g @ g.T
        against = inner @ w / np.linalg.norm(g, axis=1)  # the sum along each, per unit of it
        if abs(against.min()) > 0.02 * (w * np.linalg.norm(g, axis=1)).max():
            assert bool(reasons.opposed(row)) == bool(against.min() < 0)
        cosines = inner / np.sqrt(np.outer(np.diag(inner), np.diag(inner)))
        assert reasons.oppose(row) == bool(cosines.min() < -reasons.SMALL)
        assert reasons.changed(row) == bool((abs(c - w) > 2 * reasons.SMALL * w).any())
    assert reasons.share(seen, reasons.changed) == "25"


def test_a_gradient_of_next_to_nothing_opposes_none():
    gradients = np.array([[1.0, 0], [0.9, 0.1], [-1e-5, 0]])
    (row,) = reasons.by_step(logged([(gradients, np.ones(3) / 3, np.ones(3) / 3)]))
    assert reasons.oppose(row) is False and reasons.opposed(row) == []
    gradients[2] *= 1e4
    (row,) = reasons.by_step(logged([(gradients, np.ones(3) / 3, np.ones(3) / 3)]))
    assert reasons.oppose(row) and reasons.most_opposed([row, row]) == "c, 100"


def test_the_table_says_what_is_known_and_leaves_the_rest_empty():
    cone = {"retention/slope": [0.1, -0.1, 0.2, -0.3], "retention/slope_kept": [None, 0.1, 0, 0]}
    full = {"step/a/slope": [0.1, -0.1], "step/b/slope": [-0.1, -0.1]}
    full["step/a/slope_kept"] = [1e-8, -1e-8]  # what float32 leaves of a bound
    log = {"cone-0": cone, "full-0": full, "full-1": full, "sft-0": {}}
    runs = {n: {"log": found, "scores": {"grpo": {}}} for n, found in log.items()}
    table = reasons.steps({"runs": runs})
    head, _, *lines = (line.strip("| ").split(" | ") for line in table.splitlines())
    found = {line[0]: dict(zip(head, line, strict=False)) for line in lines}
    assert set(found) == {"cone", "full"}
    assert found["cone"]["kept KL rises, Adam's step"] == "50"
    assert found["cone"]["kept KL rises, step taken"] == "33" and found["cone"]["steps"] == "4"
    assert (
        found["full"]["steps"] == "4"
        and found["full"]["a reward's loss rises, Adam's step"] == "50"
    )
    assert found["full"]["the same, step taken"] == "0"
