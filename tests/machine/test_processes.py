"""A run in two processes, on gloo, against the same run in one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from bbkit import InputError
from bbkit.machine.files import read_json, read_rows
from bbkit.machine.processes import share

SMALL = [
    f"--set={item}"
    for item in (
        "sft.batch_size=16", "sft.micro_batch_size=4", "grpo.prompts=8", "grpo.generations=4",
        "grpo.micro_batch_size=8", "grpo.sample_at_once=16", "retention.rule=step",
        "retention.budget=0.001", "retention.replies=8", "retention.per_step=4", "grpo.metric=step",
        "grpo.combination=dual_cone", "grpo.advantages=capability", "grpo.controller.rule=deficit",
        "evaluation.questions=12", "evaluation.instructions=12", "evaluation.bootstrap=50",
        "evaluation.max_new_tokens=24", "evaluation.elsewhere=3", "run.threads=1",
    )
]  # fmt: skip
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip


def command(launcher, out, steps, port=0):
    there = [f"--set=sft.steps={steps}", f"--set=grpo.steps={steps}", "--out", str(out)]
    parts = [*launcher, "--main_process_port", str(port)] if launcher is LAUNCH else launcher
    return [*parts, "-m", "bbkit.train", "--preset", "pocket", *SMALL, *there]


def run(launcher, out, steps):
    done = subprocess.run(command(launcher, out, steps), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def same(two, one):
    """The runs agree: adapters to 1e-4, replies and verdicts one by one, one row a step."""
    for stage in ("sft", "grpo"):
        a, b = (load_file(r / stage / "adapter" / "adapter_model.safetensors") for r in (two, one))
        error = sum((a[k] - b[k]).square().sum() for k in b).sqrt()
        assert error <= 1e-4 * sum(v.square().sum() for v in b.values()).sqrt(), stage
        held_out = [read_rows(r / "evaluation" / f"{stage}.jsonl") for r in (two, one)]
        for ours, theirs in zip(*held_out, strict=True):
            assert ours["reply"] == theirs["reply"]
            assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-3)  # verdicts, nats
    steps = [[(x["stage"], x["step"]) for x in read_rows(r / "metrics.jsonl")] for r in (two, one)]
    assert steps[0] == steps[1]
    assert read_json(two / "run.json")["status"] == "done"


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run([sys.executable], one, 20)
    said = run(LAUNCH, two, 20)
    assert said.count("report:") == 1  # the other process is silent
    same(two, one)


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_to_the_same_bits(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(LAUNCH, whole, 6)
    process = subprocess.Popen(
        command(LAUNCH, cut, 6), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    metrics = cut / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"grpo"' in metrics.read_text()):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert json.loads((cut / "run.json").read_text())["status"] == "interrupted"
    assert "going on from step" in run(LAUNCH, cut, 6)
    file = "adapter/adapter_model.safetensors"
    assert (cut / file).read_bytes() == (whole / file).read_bytes()


def test_sequences_that_cannot_be_shared_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert share(32, 8, "grpo") == 1
    with pytest.raises(
        InputError, match=r"grpo\.micro_batch_size=8 in 4 processes must divide the 16"
    ):
        share(16, 8, "grpo")
    assert share(16, 4, "grpo") == 1
