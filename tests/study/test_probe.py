"""The probe's figures against ones computed another way, on the pocket model."""

import argparse
import json
import math
from itertools import pairwise

import pytest
import torch

from bbkit import CannotRun, combination, gradients, train, weighting
from bbkit.machine import memory
from bbkit.study import probe

SMALL = [
    "--preset", "pocket", "--set", "sft.steps=2", "--set", "sft.batch_size=8", "--stages", "sft",
    "--set", "sft.micro_batch_size=8", "--set", "run.threads=1", "--set", "grpo.generations=4",
    "--set", "grpo.prompts=4", "--set", "grpo.micro_batch_size=8", "--set", "retention.rule=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "run"
    assert train.main([*SMALL, "--out", str(out)]) == 0
    return out


def at(run):
    return argparse.Namespace(run=run, stage="sft", seed=1, data_dir=None, offline=False)


@pytest.fixture
def trainer(run, tmp_path):
    """The trainer at the run's SFT, with four groups of four and rewards that vary in each."""
    made = probe.trainer_at(at(run), tmp_path, {"steps": 1, "prompts": 4})
    batches = probe.samples(made)
    assert len(batches) == 2 and made.raw_rewards.shape == (16, 3)
    made.raw_rewards = torch.rand(16, 3, generator=torch.Generator().manual_seed(0))
    return made, batches


def test_noise_is_the_spread_of_the_groups_gradients(trainer):
    made, batches = trainer
    found = probe.noise(made, batches)
    columns = weighting.advantages(made.raw_rewards, 4, [1 / 3] * 3, "grpo")
    parts = []
    for b in range(4):
        some = slice(4 * (b % 2), 4 * (b % 2) + 4)  # two groups in each of two batches
        made.model.zero_grad()
        terms, _ = probe.terms(made, {k: v[some] for k, v in batches[b // 2].items()})
        (terms * columns[4 * b : 4 * b + 4].mean(1)).sum().backward()
        parts.append(
            torch.cat([p.grad.flatten() for p in made.capture.parameters.values()]).double()
        )
    parts = torch.stack(parts)
    signal = (parts.sum(0).square().sum() - parts.square().sum()) / 12
    wanted = (parts.square().sum() / 4 - signal) / signal if signal > 0 else math.nan
    assert found["grpo"]["all"] == pytest.approx(float(wanted), rel=1e-3, nan_ok=True)
    assert set(found) == {*weighting.SCHEMES, probe.OURS}
    assert all(set(row) == {"all", "low", "high", "ratio", "interval"} for row in found.values())


def test_gradients_that_do_not_fit_where_the_model_is_are_refused(trainer, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: asked.append(device) or 10**6)
    with pytest.raises(CannotRun, match=r"16 gradients of .* do not fit; fewer --prompts"):
        probe.noise(*trainer)
    assert asked == [trainer[0].model.device]


def test_plain_descent_along_the_dual_cone_raises_no_loss(run, tmp_path):
    """Without momentum the step is the combined gradient's own, so the promise holds exactly."""
    changed = {"steps": 3, "optimizer": "sgd", "scheduler": "constant"}
    found = probe.opposed(probe.trainer_at(at(run), tmp_path, changed))
    own = {name: row for name, row in found.items() if "," not in name}
    assert all(row["share"] == 0 and row["cosine"] > -1e-6 for row in own.values()), found
    assert max(row["cosine"] for row in own.values()) > 0.05, found
    later = {name: found[f"{name}, next batch"] for name in own}
    assert all(0 < row["n"] < 3 for row in later.values()) and len(found) == 2 * len(own)
    assert all(later[n]["cosine"] != own[n]["cosine"] for n in own)


def test_the_residual_of_the_first_order_is_of_the_second(trainer):
    """Along the dual-cone step d, each loss changes by −η⟨g_k, d⟩ + O(η²)."""
    made, batches = trainer
    made.model.double()  # norms and rotary embedding still compute in float32
    weights = made.controller.weights
    columns = weighting.advantages(made.raw_rewards, 4, weights)
    capture = gradients.Capture(made.model, 3)
    with gradients.watch(made.model, capture):
        for part, share in zip(batches, columns.split(8), strict=True):
            capture.next(share)
            probe.terms(made, part)[0].sum().backward()
    step = combination.combine(capture.gramian, "dual_cone", weights).to(capture.gradients)
    step = step @ capture.gradients
    slopes = capture.gradients @ step
    assert (slopes > -1e-9 * slopes.abs().max()).all()  # no capability loses along it
    trained = [*capture.parameters.values()]
    start = torch.nn.utils.parameters_to_vector(trained).detach()

    def losses(size):
        torch.nn.utils.vector_to_parameters(start - size * step, trained)
        with torch.no_grad():
            found = torch.cat([probe.terms(made, part)[0] for part in batches])
        return columns.to(found).T @ found

    residuals = [losses(0.0) - eta * slopes - losses(eta) for eta in (1e-3, 5e-4, 2.5e-4)]
    for one, half in pairwise(residual.norm().item() for residual in residuals):
        assert one / half == pytest.approx(4, rel=0.15)
    assert residuals[-1].abs().max() < 0.05 * 2.5e-4 * slopes.abs().max()


def test_command_prints_and_writes_every_figure(run, tmp_path, capsys):
    out = tmp_path / "probe.json"
    assert probe.main([str(run), "--prompts", "4", "--steps", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["noise"]["gdpo"]) == {"all", "low", "high", "ratio", "interval"}
    assert found["opposed_adam"] and found["opposed_euclidean"]
    assert all(r["share"] == 0 for n, r in found["opposed_step"].items() if "next" not in n)
    assert f"| {probe.OURS} |" in capsys.readouterr().out
    assert probe.main([str(tmp_path / "none")]) == 2
    assert "no run.json" in capsys.readouterr().err
    assert probe.main([str(run), "--prompts", "5"]) == 2
    assert "--prompts 5: 4 or more, and 4 times it a multiple of 8" in capsys.readouterr().err


def test_noise_of_known_parts():
    rng = torch.Generator().manual_seed(0)
    mean = torch.ones(400, dtype=torch.float64)
    found = []
    for _ in range(20):  # noise of 2,000 beside a signal of 400: a ratio of 5
        parts = mean + 5**0.5 * torch.randn(64, 400, generator=rng, dtype=torch.float64)
        found.append(probe.noise_to_signal(parts @ parts.T))
    assert sum(found) / 20 == pytest.approx(5, rel=0.05)
    alternate = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert math.isnan(probe.noise_to_signal(alternate))
    weights, rows = torch.randn(12, 2).double(), torch.randn(12, 5).double()
    parts = torch.einsum("nk,np->nkp", weights, rows).view(4, 3, 2, 5).sum(1)
    found = probe.group_gram(rows @ rows.T, weights, 3)
    assert torch.allclose(found, torch.einsum("bkp,clp->bckl", parts, parts))


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = probe._jackknife(lambda g: values[g].mean().item(), torch.arange(40))
    assert (high - low) / 2 == pytest.approx(1.96 * (values.var() / 40).sqrt().item())
