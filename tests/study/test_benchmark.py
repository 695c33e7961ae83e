"""The benchmark's figures are of the right things; how large they are is not tested."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PASSES, STEPS

from bbkit import CannotRun, combination, config, retention
from bbkit.study import benchmark, retention_cost, timing, variants


def test_it_measures_every_variant_and_writes_json(tmp_path, capsys, monkeypatch):

    def peak(words, options):
        """As in a process of its own, which the other form's test starts."""
        if "one_pass" not in options:
            return 2e8
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert benchmark.main([*words, *options]) == 0
        return int(said.getvalue().split()[-1])

    monkeypatch.setattr(timing, "peak_apart", peak)
    steps, plain_step = set(), timing.step

    def step(trainer):
        took = plain_step(trainer)
        aware = "coefficient/fever" in trainer._metrics["train"]  # one gradient per capability
        steps.add((type(trainer).__name__, aware, trainer.sampling > 0))
        return took

    monkeypatch.setattr(timing, "step", step)
    out = tmp_path / "figures.json"
    assert benchmark.main([*PASSES, "--out", str(out)]) == 0
    assert steps == {("Timed", False, True), ("CapabilityAware", True, True)}
    found = json.loads(out.read_text())
    rows = {row["variant"]: row for row in found["rows"]}
    assert set(rows) == set(variants.VARIANTS) and "machine" in found
    for key in ("backward", "both", "step", "step_with_generation"):
        assert rows["plain"][key] == 1.0 and rows["one_pass"][key] > 0
    assert all(row["peak_bytes"] > 1e7 for row in rows.values())
    table = capsys.readouterr().out
    assert all(f"| {variant} |" in table for variant in variants.VARIANTS)


@pytest.mark.parametrize("trains", ["dora", "all"])
def test_it_measures_what_else_trains(trains, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "peak_apart", lambda words, options: 2e8)
    out = tmp_path / "figures.json"
    assert benchmark.main([*PASSES, "--trains", trains, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["trains"] for row in rows} == {trains} and rows[1]["both"] > 0
    model, _ = timing.lora_model(config.load("pocket"), trains)
    named = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("magnitude" in n if trains == "dora" else "embed" in n for n in named)


def test_unsloth_has_rows_of_its_own_where_there_is_a_gpu(tmp_path, monkeypatch, capsys):
    made = []

    def run(command, real=subprocess.run, **options):
        if "model.backend=unsloth" not in command:
            return real(command, **options)
        made.append(command)
        rows = [
            {"capabilities": 2, "rank": 4, "variant": name, "backend": "unsloth", "seconds": 0.0}
            for name in variants.VARIANTS
        ]
        for row in rows[2:]:
            del row["seconds"]
        Path(command[-1]).write_text(json.dumps({"rows": rows}))
        return subprocess.CompletedProcess(command, 0)

    assert list(variants.VARIANTS)[:2] == ["plain", "one_pass"]
    monkeypatch.setattr(timing, "peak_apart", lambda words, options: 2e8)
    monkeypatch.setattr(benchmark, "backend_beside", lambda args: True)
    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "figures.json"
    assert benchmark.main([*PASSES, "--out", str(out)]) == 0
    backends = [row["backend"] for row in json.loads(out.read_text())["rows"]]
    half = len(variants.VARIANTS)
    assert backends == ["transformers"] * half + ["unsloth"] * half
    assert made[0][:5] == [sys.executable, "-m", "bbkit.benchmark", *PASSES[:2]]
    assert "K 2, rank 4, one_pass: 0.000" in capsys.readouterr().out


def test_it_measures_what_retention_costs(tmp_path, capsys, monkeypatch):
    apart = timing.peak_apart  # in a process of its own: one is enough here

    def peak(words, options):
        return apart(words, options) if "grpo/step/2" in options else 2e8

    monkeypatch.setattr(timing, "peak_apart", peak)
    out = tmp_path / "figures.json"
    assert benchmark.main([*STEPS, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    kinds = [("none", 0), ("penalty", 2), ("step", 2)]
    wanted = [(stage, *kind) for stage in ("sft", "grpo") for kind in kinds]
    assert [(r["stage"], r["rule"], r["replies"]) for r in rows] == wanted
    assert all(r["step"] == 1.0 for r in rows if r["rule"] == "none")
    # Two short replies beside four rows and their backward passes; wide, for a busy machine.
    assert all(0.5 < r["step"] < 20 for r in rows) and any(r["step"] > 1 for r in rows)
    assert all(r["seconds"] > 0 and r["peak_bytes"] > 1e8 for r in rows)
    table = capsys.readouterr().out
    assert all(f"pocket | {' | '.join(map(str, kind))} | " in table for kind in wanted)


def test_each_timed_step_starts_alike_and_has_its_rule(tmp_path, monkeypatch):
    seen: dict[str, list] = {"none": [], "penalty": [], "step": []}
    plain_step = timing.step

    def step(trainer):
        before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        took = plain_step(trainer)
        noted = {**getattr(trainer, "_noted", {}), **trainer._metrics["train"]}
        seen[trainer.retention_rule].append((before, noted))
        return took

    monkeypatch.setattr(timing, "step", step)
    args = benchmark.parser().parse_args(STEPS)
    kinds = [("grpo", "none", 0), ("grpo", "penalty", 2), ("grpo", "step", 2)]
    retention_cost.step_ratios(args, kinds, tmp_path / "replies.jsonl")
    start = seen["none"][0][0]
    for turn in range(2):
        for found in seen.values():
            assert all(map(torch.equal, start, found[turn][0])) and len(found) == 2
        plain, penalty, rule = (found[turn][1] for found in seen.values())
        for name in ("completions/mean_length", "gradient_norm/format"):  # the same completions
            assert plain[name] == penalty[name] == rule[name]
        assert "retention/kl" not in plain and penalty["retention/kl"] == rule["retention/kl"]
        assert penalty["retention/kl"][0] > 1e-3  # away from the base
        assert rule["retention/slope"] != rule["retention/slope_kept"]  # and the step was moved


@pytest.mark.parametrize("rule", ["penalty", "step"])
def test_a_step_that_leaves_its_rule_out_is_refused(rule, capsys, monkeypatch):
    if rule == "step":  # no hook on the optimiser
        monkeypatch.setattr(combination.Limits, "watch", lambda self, optimizer: None)
    else:
        monkeypatch.setattr(retention, "around", lambda trainer, *rest: trainer)
    monkeypatch.setattr(retention_cost, "SHOWS", {rule: retention_cost.SHOWS[rule]})
    assert benchmark.main(STEPS) == 3
    assert f"retention {rule}: a step ran without it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["--preset", "pocked"], 2),
        (["--set", "model.name=./nowhere"], 2),
        (["--sequences", "3"], 2),
        (["--retention", "--replies", "0"], 2),
        (["--retention", "--replies", "9", "--set", "retention.replies=2"], 2),
    ],
)
def test_bad_input_is_one_line(arguments, code, capsys):
    assert benchmark.main([*PASSES, *arguments]) == code
    assert capsys.readouterr().err.startswith("error: ")


def test_a_process_killed_for_memory_is_one_line(monkeypatch):
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(CannotRun, match="ended by signal 9"):
        timing.peak_apart([], ["--peak", "plain"])
