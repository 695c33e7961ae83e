"""The nearest displacement that keeps its bounds, and the hook that takes it in an optimiser."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from bbkit.combination import Limits, gramian, inner, nearest


def solved(rows, made, scale, bounds):
    """The same displacement by a solver that knows nothing of Gramians: least-distance programming
    as non-negative least squares (Lawson and Hanson 1974, chapter 23), in the whole space."""
    wide = rows * scale.sqrt()
    system = torch.cat([-wide.T, (rows @ made - bounds)[None]]).numpy()
    target = torch.zeros(len(system), dtype=torch.float64).numpy()
    target[-1] = 1.0
    left = system @ nnls(system, target)[0] - target
    return made + scale.sqrt() * torch.from_numpy(-left[:-1] / left[-1])


@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(["", "near", "zero", "long"]))
@settings(max_examples=120, deadline=None)
def test_nearest_is_the_solution_of_the_quadratic_programme(seed, count, kind):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 8, generator=draw, dtype=torch.float64)
    made = torch.randn(8, generator=draw, dtype=torch.float64)
    scale = 0.1 + torch.rand(8, generator=draw, dtype=torch.float64)
    if kind == "near" and count > 1:
        rows[1] = rows[0] + 1e-4 * rows[1]
    if kind == "zero":
        rows[0] = 0
    bounds = 0.3 * torch.randn(count, generator=draw, dtype=torch.float64).abs()
    expected = solved(rows, made, scale, bounds)
    if kind == "long":  # the length of a row says nothing
        rows[0], bounds[0] = 1e6 * rows[0], 1e6 * bounds[0]
    removed, left = nearest((rows * scale) @ rows.T, rows @ made, bounds)
    step = made - scale * (removed @ rows)
    assert left == 0
    assert (rows @ step <= bounds + 1e-6 * rows.norm(dim=1)).all()
    assert torch.allclose(step, expected, atol=1e-5)


@example(849)  # the largest need is 4: what is given way by is in its unit
@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_bounds_that_contradict_one_another_are_broken_least(seed):
    draw = torch.Generator().manual_seed(seed)
    row, made = torch.randn(2, 6, generator=draw, dtype=torch.float64)
    rows, bounds = torch.stack([row, -row]) / row.norm(), torch.tensor([-1.0, 0.4]).double()
    removed, left = nearest(rows @ rows.T, rows @ made, bounds)
    step = made - removed @ rows
    assert left > 1e-6
    # each by half of what they are apart, and nothing is moved besides
    assert torch.allclose(rows @ step - bounds, torch.tensor([0.3, 0.3]).double(), atol=1e-6)
    aside = (step - made) - rows[0] * (rows[0] @ (step - made))
    assert aside.norm() < 1e-9


def test_a_step_that_breaks_nothing_stays_as_it_is():
    removed, left = nearest(torch.eye(2), torch.tensor([-1.0, 0.1]), torch.tensor([0.0, 0.1]))
    assert removed.tolist() == [0.0, 0.0] and left == 0
    for bounds in ([math.inf, 0.0], [math.inf, math.inf]):
        removed, _ = nearest(torch.eye(2), torch.ones(2), torch.tensor(bounds))
        assert removed.tolist() == [0.0, 0.0 if math.isinf(bounds[1]) else 1.0]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_taken_keeps_the_bound_under_any_optimiser(name, capsys):
    draw, noted = torch.Generator().manual_seed(0), []
    parameters = [torch.nn.Parameter(torch.randn(4, 3, generator=draw)) for _ in range(2)]
    optimizer = OPTIMIZERS[name](parameters)
    limits = Limits(parameters, lambda n, v: noted.append((n, v)))
    limits.watch(optimizer)
    limits.watch(optimizer)  # hooks once
    broken = 0
    for step in range(12):
        row = torch.randn(24, generator=draw)
        before = torch.cat([p.detach().flatten() for p in parameters])
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=draw)
        bound = -0.01 * (step % 3)
        limits.add("kept", row, bound)
        optimizer.step()
        moved = torch.cat([p.detach().flatten() for p in parameters]) - before
        assert (row @ moved).item() <= bound + 1e-5
        told = dict(noted[-3:])
        assert told["kept/slope_kept"] == pytest.approx((row @ moved).item(), abs=1e-6)
        broken += told["kept/slope"] > bound
        assert (told["step/cut"] > 0) == (told["kept/slope"] > bound)
    assert broken >= 3 and len(noted) == 36
    assert ("plain distance" in capsys.readouterr().out) == (name != "adamw")


def test_without_a_row_the_optimiser_is_left_alone():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    Limits([parameter], pytest.fail).watch(optimizer)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert parameter.tolist() == [0.0] * 3


@pytest.mark.parametrize("fused", [False, True])  # fused, it skips within its own step
def test_a_step_that_the_scaler_skips_moves_nothing(fused):
    parameter, noted = torch.nn.Parameter(torch.ones(3)), {}
    optimizer = torch.optim.AdamW([parameter], fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    limits = Limits([parameter], noted.__setitem__)
    limits.watch(optimizer)
    scaler.scale(parameter.sum()).backward()
    parameter.grad[0] = math.inf
    limits.add("kept", -torch.ones(3), -1.0)
    scaler.step(optimizer)
    assert parameter.tolist() == [1.0] * 3 and not noted


def test_where_hardly_any_gradient_came_rounding_does_not_decide_the_step():
    """Two processes sum in another order: 1e-5 or 3e-5 of 1 is the same gradient."""
    taken = []
    for noise in ([1e-5, 3e-5], [3e-5, 1e-5]):
        weights = torch.nn.Parameter(torch.zeros(5))
        optimizer = torch.optim.Adam([weights], lr=0.1)
        limits = Limits([weights], lambda *_: None)
        limits.watch(optimizer)
        limits.add("retention", torch.ones(5), 0.0)
        weights.grad = torch.tensor([-1.0, -1.0, -1.0, *noise])
        optimizer.step()
        taken.append(weights.detach().clone())
    assert torch.allclose(*taken, rtol=1e-3)


def test_adam_with_8_bit_states_is_kept_in_plain_distance(capsys):
    from bitsandbytes.optim import AdamW8bit

    draw, noted = torch.Generator().manual_seed(0), {}
    parameter = torch.nn.Parameter(torch.randn(128, 64, generator=draw))  # 4,096 and more are 8 bit
    optimizer = AdamW8bit([parameter], lr=0.1)
    limits = Limits([parameter], noted.__setitem__)
    limits.watch(optimizer)
    for _ in range(3):
        parameter.grad = torch.randn(parameter.shape, generator=draw)
        limits.add("retention", torch.randn(parameter.numel(), generator=draw), -0.01)
        optimizer.step()
        bound = -0.01 + 1e-4 * abs(noted["retention/slope"])
        assert noted["retention/slope_kept"] <= bound
    assert optimizer.state[parameter]["state2"].dtype == torch.uint8
    assert "AdamW8bit has no float moments" in capsys.readouterr().out


def test_rows_that_oppose_one_another_are_no_error():
    """A reward, and one that is the other way round, on a step: with a slack of 1e-9 for 1e-6
    quadprog found every fifth of these contradictory, and the run ended there."""
    draw = torch.Generator().manual_seed(0)
    for turn in range(200):
        rows = torch.randn(3 + turn % 3, 300, generator=draw)
        rows[1] = -rows[2] * (0.1 + 3 * torch.rand(1, generator=draw))
        rows = rows * 10 ** (2 * torch.rand(len(rows), 1, generator=draw) - 1)
        scale = 0.1 + 10 * torch.rand(300, generator=draw)
        bounds = torch.zeros(len(rows))
        bounds[0] = 3e-3 if turn % 2 else -3e-3
        made = 1e-3 * torch.randn(1, 300, generator=draw)
        removed, left = nearest(gramian(rows, scale), inner(rows, made)[:, 0], bounds)
        assert removed.isfinite().all() and left >= 0
