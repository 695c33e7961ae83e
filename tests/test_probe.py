"""The probe's figures against ones computed another way, on the pocket model."""

import argparse
import json

import pytest
import torch

from bbkit import gradients, probe, train, weighting

SMALL = [
    "--preset", "pocket", "--set", "sft.steps=2", "--set", "sft.batch_size=8", "--stages", "sft",
    "--set", "sft.micro_batch_size=8", "--set", "run.threads=1", "--set", "grpo.generations=4",
    "--set", "grpo.prompts=4", "--set", "grpo.micro_batch_size=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "run"
    assert train.main([*SMALL, "--out", str(out)]) == 0
    return out


@pytest.fixture
def trainer(run, tmp_path):
    """The trainer at the run's SFT, with four groups of four and rewards that vary in each."""
    args = argparse.Namespace(run=run, stage="sft", prompts=4, seed=1, data_dir=None, offline=False)
    made = probe.trainer_at(args, tmp_path)
    inputs = probe.sample(made)
    made.raw_rewards = torch.rand(16, 3, generator=torch.Generator().manual_seed(0))
    return made, inputs


def test_noise_is_the_spread_of_the_groups_gradients(trainer):
    made, inputs = trainer
    found = probe.noise(made, inputs)
    columns = weighting.advantages(made.raw_rewards, 4, [1 / 3] * 3, "grpo")
    parts = []
    for b in range(4):
        some = slice(4 * b, 4 * b + 4)
        made.model.zero_grad()
        terms, *_ = probe.terms(made, {k: v[some] for k, v in inputs.items()})
        (terms * columns[some].mean(1)).sum().backward()
        parts.append(
            torch.cat([p.grad.flatten() for p in made.capture.parameters.values()]).double()
        )
    parts = torch.stack(parts)
    wanted = parts.var(0).sum() / parts.mean(0).square().sum()
    assert found["grpo"]["all"] == pytest.approx(wanted.item(), rel=1e-3)
    assert found["grpo"]["ratio"] == 1.0
    assert set(found) == {*weighting.SCHEMES, probe.OURS}
    assert all(r["interval"][0] <= r["ratio"] <= r["interval"][1] for r in found.values())


def test_the_residual_of_the_first_order_is_of_the_second(trainer):
    made, inputs = trainer
    made.model.double()
    before = {n: p.clone() for n, p in made.model.named_parameters()}
    sizes = [1e-3 / 2**i for i in range(5)]
    found = probe.interference(made, inputs, sizes)
    assert all(1.8 <= e <= 2.2 for e in found["exponent"]), found["exponent"]
    for predicted, realised in zip(found["predicted"], found["realised"], strict=True):
        assert predicted[-1] == pytest.approx(realised[-1], rel=0.05)
        assert predicted[-1] <= 0  # no capability loses along the dual-cone step
    assert all(torch.equal(before[n], p) for n, p in made.model.named_parameters())


def test_command_prints_and_writes_every_figure(run, tmp_path, capsys):
    out = tmp_path / "probe.json"
    assert probe.main([str(run), "--prompts", "4", "--steps", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["noise"]["gdpo"]) == {"all", "low", "high", "ratio", "interval"}
    assert "retention" in found["opposed_adam"] and "retention" in found["opposed_euclidean"]
    assert f"| {probe.OURS} |" in capsys.readouterr().out
    assert probe.main([str(tmp_path / "none")]) == 2
    assert "no run.json" in capsys.readouterr().err


def test_noise_of_known_parts():
    g = torch.randn(50, 6, dtype=torch.float64) + 2.0
    wanted = g.var(0).sum() / g.mean(0).square().sum()
    assert gradients.noise_to_signal(g @ g.T) == pytest.approx(wanted.item())
    weights, rows = torch.randn(12).double(), torch.randn(12, 5).double()
    parts = (weights.unsqueeze(1) * rows).view(4, 3, 5).sum(1)
    assert torch.allclose(gradients.group_gram(rows @ rows.T, weights, 3), parts @ parts.T)
