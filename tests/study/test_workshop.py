"""A run from a notebook: what it says, that it trains what is missing, that an error is a line."""

import os
import signal

import pytest

from bbkit import config, models
from bbkit.machine import files, hub, loading
from bbkit.runs import callback
from bbkit.study import workshop

SMALL = (
    "sft.steps=2", "sft.batch_size=8", "sft.micro_batch_size=8", "grpo.steps=1", "grpo.prompts=4",
    "grpo.generations=4", "grpo.micro_batch_size=16", "retention.rule=none",
    "evaluation.questions=4", "evaluation.instructions=4", "evaluation.elsewhere=0",
    "evaluation.bootstrap=20", "evaluation.max_new_tokens=8", "run.threads=1",
)  # fmt: skip


def steps(folder):
    return [(row["stage"], row["step"]) for row in files.read_rows(folder / "metrics.jsonl")]


def test_a_run_in_parts_trains_what_is_missing_and_says_so(tmp_path, capsys):
    folder = tmp_path / "runs" / "pocket"
    assert workshop.run("pocket", folder, "sft", SMALL) == folder
    first = capsys.readouterr().out
    before, _, after = first.partition("backend transformers")
    assert "\nfits: " in before and before.startswith("minutes: about ")
    assert "\rsft: 100%" in after and "\nmeasured, in minutes: sft 0." in after
    assert workshop.run("pocket", folder, "sft,grpo,evaluate", SMALL) == folder
    again = capsys.readouterr().out
    assert steps(folder) == [("sft", 1), ("sft", 2), ("grpo", 1)] and "\rsft: " not in again
    assert "evaluate grpo" in again.splitlines()[-1]


@pytest.mark.parametrize(
    ("preset", "stages", "changes", "line"),
    [
        ("pocket", "sft", ("sft.step=3",), "did you mean sft.steps?"),
        ("pockett", "sft", (), "no preset 'pockett'; did you mean pocket?"),
        ("pocket", "sftt", (), "--stages sftt: no stage 'sftt'"),
    ],
)
def test_an_error_is_a_line_and_none(preset, stages, changes, line, tmp_path, capsys):
    assert workshop.run(preset, tmp_path / "run", stages, changes) is None
    said = capsys.readouterr()
    assert line in said.err and not said.out and not (tmp_path / "run").exists()


def test_the_stop_button_saves_and_the_same_call_goes_on(tmp_path, capsys, monkeypatch):
    whole = callback.Recorder.on_log

    def pressed(self, args, state, control, **options):
        whole(self, args, state, control, **options)
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(callback.Recorder, "on_log", pressed)
    assert workshop.run("pocket", tmp_path, "sft", SMALL) is None
    assert "interrupted: what is saved stays" in capsys.readouterr().err
    assert steps(tmp_path) == [("sft", 1)]
    monkeypatch.setattr(callback.Recorder, "on_log", whole)
    assert workshop.run("pocket", tmp_path, "sft", SMALL) == tmp_path
    assert "sft: going on from step 1" in capsys.readouterr().out
    assert steps(tmp_path) == [("sft", 1), ("sft", 2)]


def test_after_pocket_another_model_may_be_fetched(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(hub, "WISHED", {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"})
    for name in hub.WISHED:
        monkeypatch.setenv(name, "1")  # put back after the test
    hub.go_private(True)
    assert huggingface_hub.constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    hub.go_private(False)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert {os.environ[name] for name in hub.WISHED} == {"0"}
    hub.WISHED["HF_HUB_OFFLINE"] = "1"  # what the person at the keyboard wished holds
    hub.go_private(False)
    assert huggingface_hub.constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def test_on_a_t4_every_choice_is_said(monkeypatch):
    """float16, PyTorch's attention, no kernels that need bfloat16; the model stays on the CPU."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    said = []
    dtype, device = loading.choose_dtype(config.load("t4").model, said.append)
    assert (dtype, device.type) == (torch.float16, "cuda")
    assert loading.choose_dtype(config.Model(dtype="auto"), said.append)[0] == torch.float16
    assert said[-1] == "dtype float16: this GPU has no bfloat16"
    monkeypatch.undo()
    model, _ = models.load(config.Model(), said.append)
    assert "attention sdpa: PyTorch's own, for any GPU and dtype" in said
    assert model.config._attn_implementation.startswith("sdpa")


@pytest.mark.parametrize(("load", "threads"), [(0.0, None), (64.0, "1")])
def test_a_command_shows_what_it_says_as_it_says_it(load, threads, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    (tmp_path / "said.py").write_text(
        "import os, sys, time\n"
        "print('here', os.environ.get('OMP_NUM_THREADS'))\n"
        "while not os.path.exists('seen'):\n    time.sleep(0.02)\n"
        "print('over', file=sys.stderr)\nsys.exit(3)\n"
    )
    real = print

    def seen(*words, **how):
        real(*words, **how)
        if "here" in words[0]:  # before the process goes on
            (tmp_path / "seen").touch()

    monkeypatch.setattr("builtins.print", seen)
    assert workshop.command(["python", "-m", "said"], tmp_path, minutes=1) == 3
    out = capsys.readouterr().out
    assert f"here {threads}\nover\n" in out and ("threads: 1," in out) == (threads == "1")


def test_a_command_that_takes_too_long_saves_and_is_told_how_to_go_on(tmp_path, capsys):
    (tmp_path / "long.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(130)))\n"
        "print('begun')\ntime.sleep(60)\n"
    )
    assert workshop.command(["python", "-m", "long"], tmp_path, minutes=0.02) == 130
    assert "begun\nsaved\nstopped after 0.02 minutes; run the cell again" in capsys.readouterr().out
