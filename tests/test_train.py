"""The command line of one run: whole runs, resumes to the bit, and clear refusals."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest
import torch

from bbkit import InputError, config, data, models, prompts, train
from bbkit.machine import files
from bbkit.machine.files import read_rows
from bbkit.study import runner

SMALL = [
    "--preset", "pocket", "--set", "sft.steps=4", "--set", "sft.save_steps=2",
    "--set", "sft.batch_size=8", "--set", "sft.micro_batch_size=4", "--set", "grpo.steps=3",
    "--set", "grpo.save_steps=1", "--set", "grpo.prompts=4", "--set", "grpo.generations=4",
    "--set", "grpo.micro_batch_size=8", "--set", "evaluation.questions=12",
    "--set", "evaluation.instructions=12", "--set", "evaluation.max_new_tokens=24",
    "--set", "evaluation.bootstrap=50", "--set", "evaluation.elsewhere=3",
    "--set", "run.threads=1",
    # The whole method, since it has the most to lose in a resume.
    "--set", "retention.rule=step", "--set", "retention.budget=0.2", "--set",
    "sft.warmup_steps=0", "--set", "sft.learning_rate=1e-2", "--set",
    "retention.replies=8", "--set", "retention.per_step=2", "--set", "grpo.metric=step",
    "--set", "grpo.controller.rule=deficit", "--set", "grpo.advantages=capability",
    "--set", "grpo.combination=dual_cone", "--set", "grpo.beta=0.05",
]  # fmt: skip


def kept(*items: str) -> list[str]:
    return ["--preset", "pocket", *(f"--set={item}" for item in items)]


# Python forced out of UTF-8; LC_ALL=C alone does not: it reads UTF-8 under that by itself.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def start(*words: str, code: str = "", **env: str) -> subprocess.Popen:
    """The command as a user types it (or `code` before it), in a process of its own."""
    call = ["-m", "bbkit.train", *words]
    if code:
        call = [
            "-c",
            f"{code}\nimport sys\nfrom bbkit import train\nsys.exit(train.main(sys.argv[1:]))",
            *words,
        ]
    return subprocess.Popen(
        [sys.executable, *call], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | env,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One uninterrupted small run, for which connecting is an error, and the locale is ASCII."""
    guard = (
        "import socket, sys\nfrom bbkit.machine import loading\n"
        "def refuse(*a): raise SystemExit('tried to connect')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "def choose(*how, whole=loading.choose_backend):\n"
        "    print('early:', sorted({'transformers', 'trl', 'peft'} & sys.modules.keys()))\n"
        "    return whole(*how)\n"
        "loading.choose_backend = choose"
    )
    out = tmp_path_factory.mktemp("whole") / "run"
    code, text, err = finish(start(*SMALL, "--out", str(out), code=guard, **ASCII))
    assert code == 0, text + err
    (out.parent / "said").write_text(text)
    return out


@pytest.mark.parametrize("mended", [True, False])
def test_every_command_reads_utf8_or_says_how_to(mended, tmp_path):
    (tmp_path / "card.md").write_text("Gallouédec", encoding="utf-8")
    none = "" if mended else "import locale\nlocale.setlocale = lambda *_: 'C'\n"
    code = (
        f"{none}from pathlib import Path\nfrom bbkit import exit_code\n"
        "raise SystemExit(exit_code(lambda: print(Path('card.md').read_text())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | ASCII, cwd=tmp_path, capture_output=True
    )
    if mended:
        assert (done.returncode, done.stdout) == (0, b"Gallou\\xe9dec\n"), done.stderr
    else:
        assert done.returncode == 3 and not done.stdout
        assert done.stderr.startswith(b"error: files would be read as ") and b"=1\n" in done.stderr


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys, bbkit.train as t\nt.parser().format_help()\nassert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_ifeval_is_read_before_the_model_and_as_the_settings_say(tmp_path, capsys, monkeypatch):
    whole = data.load

    def load(card, *args, **options):
        if card == "ifeval":
            raise InputError(f"ifeval {options}")
        return whole(card, *args, **options)

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model came first"))
    words = ["--set", "evaluation.ifeval=2", "--set", "data.allow_changed=true"]
    assert train.main(["--preset", "pocket", *words, "--out", str(tmp_path / "run")]) == 2
    assert "'allow_changed': True" in capsys.readouterr().err


def test_nothing_that_unsloth_changes_is_imported_before_it(whole):
    """unsloth changes transformers, PEFT and TRL as it is imported, by loading.choose_backend."""
    assert "early: []" in (whole.parent / "said").read_text()


def test_a_run_leaves_the_folder_of_the_contract(whole):
    manifest = json.loads((whole / "run.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["settings"]["sft"]["steps"] == 4 and manifest["prompt_hash"]
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [
        *(("sft", i) for i in range(1, 5)),
        *(("grpo", i) for i in range(1, 4)),
    ]
    keys = {"loss", "entropy", "unparsed", "gradient_engine", "seconds/step"}
    keys |= {
        f"{part}/{k}"
        for part in ("reward", "sigma", "weight", "coefficient", "gradient_norm")
        for k in ("domain", "reasoning", "format")
    }
    keys |= {"seconds/combination", "retention/cut", "step/domain/slope_kept"}
    keys |= {f"retention/{part}" for part in ("kl", "slope", "slope_kept")}
    assert keys <= set(rows[-1]), keys - set(rows[-1])
    assert rows[-1]["gradient_engine"] == "one_pass"
    cosines = {key for row in rows[4:] for key in row if key.startswith("cosine/")}
    assert cosines, "no two rewards varied in any step"
    for row in rows:  # the bound of every step of both stages, to rounding
        bound = 0.3 * (0.2 - row["retention/kl"])
        room = 1e-4 * max(abs(bound), abs(row["retention/slope"]))
        assert row["retention/slope_kept"] <= bound + room
    report = (whole / "report.md").read_text()
    assert "## Retention\n\nRule step, replies to pocket_prompts.\n\n- SFT: KL(base" in report
    kinds = [row["kind"] for row in read_rows(whole / "replies.jsonl")]
    assert Counter(kinds) == dict.fromkeys(("chat", "question", "echo", "instruction"), 2)
    evaluation = json.loads((whole / "evaluation.json").read_text())
    for stage in ("base", "sft", "grpo"):
        for name in (
            "domain",
            "reasoning",
            "instruction",
            "instruction_unseen",
            "format",
            "unparsed",
        ):
            found = evaluation[stage][name]
            assert 0 <= found["interval"][0] <= found["value"] <= found["interval"][1] <= 1
            assert found["n"] > 0
    assert set(evaluation["difference"]) == {"sft-base", "grpo-sft", "grpo-base"}
    assert (whole / "adapter" / "adapter_model.safetensors").is_file()
    report = (whole / "report.md").read_text()
    for figure in (whole / "figures").glob("*.png"):
        assert f"figures/{figure.name}" in report
    assert not list(whole.rglob("*.tmp"))


def test_the_same_command_again_changes_nothing(whole):
    before = (whole / "adapter" / "adapter_model.safetensors").read_bytes()
    metrics = (whole / "metrics.jsonl").read_bytes()
    assert train.main([*SMALL, "--out", str(whole)]) == 0
    assert (whole / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert (whole / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.usefixtures("undrawn")
def test_stages_one_after_the_other_are_the_whole_run(whole, tmp_path):
    out = tmp_path / "run"
    for stages in ("sft", "grpo", "evaluate"):
        assert train.main([*SMALL, "--stages", stages, "--out", str(out)]) == 0
    file = "adapter/adapter_model.safetensors"
    assert (out / file).read_bytes() == (whole / file).read_bytes()
    found = json.loads((out / "evaluation.json").read_text())
    assert found == json.loads((whole / "evaluation.json").read_text())


def comparable(folder: Path) -> dict:
    """All that a resumed run must have in common with an uninterrupted one."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "train_runtime", "train_samples", "train_steps")
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "sft": (folder / "sft" / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in r.items() if not k.startswith(measured)} for r in rows],
        "samples": (folder / "samples.jsonl").read_text(),
        "evaluation": (folder / "evaluation.json").read_text(),
    }


def wait_for(folder: Path, stage: str, step: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        file = folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        if any(f'"stage": "{stage}", "step": {step}' in line for line in lines):
            return
        time.sleep(0.02)


SLOW = """
import time
from bbkit import grpo
made, steps = grpo.reward_functions, []
def slow(*how):
    first, *rest = made(*how)
    def domain(**given):
        steps.append(1)
        time.sleep(60 * (len(steps) > 1))
        return first(**given)
    return [domain, *rest]
grpo.reward_functions = slow
"""


# a job in the background, as pytest may be, begins with Ctrl-C ignored
CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


@pytest.mark.parametrize(
    "moments",
    [
        [("sft", 3, signal.SIGKILL), ("grpo", 1, signal.SIGTERM)],
        *(
            pytest.param([("sft", 1, how), ("grpo", 1, how)], marks=pytest.mark.slow)
            for how in (signal.SIGTERM, signal.SIGINT)
        ),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_run_resumes_to_the_same_bits(whole, tmp_path, capsys, moments):
    """Where it may, it saves first, and gives up a step that takes a minute and nothing else."""
    out = tmp_path / "run"
    words = [*SMALL, "--set", "grpo.save_steps=50", "--out", str(out)]
    for stage, step, how in moments:
        process = start(*words, code=CTRL_C + SLOW)
        wait_for(out, stage, step, process)
        time.sleep(2 * (stage == "grpo"))  # into the slow part of its second step
        began = time.monotonic()
        process.send_signal(how)
        code, text, err = finish(process)
        assert code == (-how if how == signal.SIGKILL else 130), text + err
        assert time.monotonic() - began < 30
    assert train.main(words) == 0
    assert "grpo: going on from step 1" in capsys.readouterr().out
    assert comparable(out) == comparable(whole)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.usefixtures("undrawn")
def test_killed_after_the_last_step_and_before_the_next_stage(whole, tmp_path, capsys, stage):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    manifest = json.loads((out / "run.json").read_text())
    for name in list(manifest["stages"]):
        if name.endswith("grpo") or (stage == "sft" and name.endswith("sft")):
            manifest["stages"].pop(name)
    (out / "run.json").write_text(json.dumps(manifest))
    if stage == "sft":
        shutil.rmtree(out / "grpo")
    shutil.rmtree(out / stage / "adapter")
    assert train.main([*SMALL, "--out", str(out)]) == 0
    last = {"sft": 4, "grpo": 3}[stage]
    assert f"{stage}: going on from step {last}" in capsys.readouterr().out
    assert comparable(out) == comparable(whole)


@pytest.fixture
def disk(tmp_path):
    """A disk of its own that a test may fill."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", path]).returncode:
        pytest.skip("mounting a small tmpfs needs root, and a container that lets it")
    yield path
    subprocess.run(["umount", path])


@pytest.mark.slow
def test_50_kills_at_any_moment_end_in_the_same_bits(whole, disk):
    """While it loads, trains, saves or evaluates; some with the newest checkpoint torn after it.

    SIGTERM and Ctrl-C lose no step and are through in 10 s; kill -9 and a full disk lose at most
    one interval between checkpoints, a torn one one more.
    """
    rng, kills, number, ballast = random.Random(0), Counter(), 0, disk / "ballast"
    interval = {"sft": 2, "grpo": 1}
    manifest = json.loads((whole / "run.json").read_text())
    lasts = datetime.fromisoformat(manifest["end"]) - datetime.fromisoformat(manifest["start"])
    lost = {"SIGTERM": 0, "SIGINT": 0, "SIGKILL": 1, "full disk": 1, "torn": 2}
    while kills.total() < 50:
        out, number, allowed, reached = disk / f"{number}", number + 1, 0, ("", 0)
        while True:
            process = start(*SMALL, "--out", str(out), code=CTRL_C)
            try:
                process.wait(rng.uniform(0.3, 1.2) * lasts.total_seconds())
                how = ""
            except subprocess.TimeoutExpired:
                how = rng.choice(list(lost))
                began = time.monotonic()
                if how == "full disk":
                    with suppress(OSError), ballast.open("wb", buffering=0) as file:
                        while file.write(bytes(4096)):
                            pass
                else:
                    name = "SIGKILL" if how == "torn" else how
                    process.send_signal(getattr(signal, name))
            code, text, err = finish(process)
            for stage, step in re.findall(r"^(sft|grpo): going on from step (\d+)", text, re.M):
                if stage == reached[0]:
                    assert reached[1] - int(step) <= allowed * interval[stage], (how, reached, text)
            if not how:
                break
            ballast.unlink(missing_ok=True)
            kills[how, code] += 1
            ends = {"SIGTERM": (0, 130, -15), "SIGINT": (0, 130, -2), "full disk": (0, 3)}
            assert code in ends.get(how, (0, -9)), (how, text + err)
            late = code and how.startswith("SIG") and time.monotonic() - began > 10
            assert not late, (how, code, text + err)
            rows, before = read_rows(out / "metrics.jsonl"), reached
            reached = (rows[-1]["stage"], rows[-1]["step"]) if rows else ("", 0)
            # it may have got no further than the last time
            allowed = max(lost[how], allowed) if reached == before else lost[how]
            newest = sorted(out.glob("*/checkpoint-*"), key=lambda p: p.stat().st_mtime)[-1:]
            if how == "torn" and newest:
                largest = max(newest[0].iterdir(), key=lambda p: p.stat().st_size)
                os.truncate(largest, largest.stat().st_size // 2)
        assert code == 0, text + err
        assert comparable(out) == comparable(whole)
        shutil.rmtree(out)
    print(f"{kills} by kind and exit code, in {number} runs")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--preset", "pockett"], 2, "did you mean pocket?"),
        (["--preset", "pocket", "--set", "grpo.stepz=3"], 2, "did you mean grpo.steps?"),
        (["--preset", "pocket", "--set", "grpo.steps=many"], 2, "grpo.steps"),
        (["--preset", "pocket", "--stages", "sft,rl"], 2, "no stage 'rl'"),
        (["--preset", "pocket", "--resume", "nowhere"], 2, "nowhere: no such folder"),
        (["--preset", "pocket", "--config", "no.yaml"], 2, "no.yaml"),
        (
            ["--preset", "pocket", "--set", "data.sft=[pubmedqa]", "--data-dir", "nodata"],
            2,
            "nodata",
        ),
        (["--preset", "pocket", "--set", "data.sft=[ifeval]"], 2, "ifeval"),
        (["--preset", "pocket", "--set", "data.sft=[mmlu_medical]"], 2, "mmlu_medical"),
        (["--preset", "pocket", "--set", "model.name=no/folder/here"], 2, "no/folder/here"),
        (["--preset", "pocket", "--set", "model.backend=unsloth"], 3, "unsloth"),
        (
            ["--preset", "t4", "--set", "grpo.metric=adam"],
            2,
            "grpo.optimizer=adamw_8bit keeps none",
        ),
        (["--preset", "pocket", "--set", "sft.retention=2"], 2, "unknown key sft.retention"),
        (["--preset", "pocket", "--set", "data.grpo=[]"], 2, "data.grpo: no rows; name a card"),
        (
            kept("retention.rule=penalty", "retention.prompts=[pocket_prompts/facts]"),
            2,
            "no kind facts; of chat, question, echo, instruction",
        ),
        (
            kept("retention.rule=penalty", "retention.prompts=[ifeval]"),
            2,
            "no split of ifeval 'train'",
        ),
        (kept("sft.replay=0.1", "retention.prompts=[no.jsonl]"), 2, "no.jsonl: cannot be read"),
        (
            kept("retention.rule=step", "retention.prompts=[self]", "retention.replies=8"),
            2,
            "of 8 user turns; 7 were empty",
        ),
    ],
)
def test_bad_input_is_one_clear_line(words, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*words, "--offline"]) == code
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err and said in err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": 7}', "replies row 1: needs a prompt"),
        ('{"prompt": [{"from": "human", "value": "Hi"}]}', "replies row 1: needs a prompt"),
        ("", "no rows"),
        ("a question of the evaluation", "replies prompt 1: of a test split"),
    ],
)
def test_a_file_of_prompts_that_cannot_serve_is_one_clear_line(row, said, tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    if row.startswith("a question"):  # as the kit asks it, options and all; no newline at the end
        row = json.dumps({"prompt": prompts.messages(data.load("ontology_chains", "test")[0])})
    file.write_text(row)
    words = kept("retention.rule=penalty", f"retention.prompts=[{file}]", "sft.steps=1")
    assert train.main([*words, "--stages", "sft", "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "replies.jsonl").exists()


def test_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--preset", "pocket", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "learning_rate" in text and "sft " in text and "grpo " in text
    own = ["--set", "grpo.rewards=[domain,missing.py:brief]"]
    assert train.main(["--preset", "pocket", "--dry-run", *own]) == 2
    assert "missing.py: cannot be read" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_corrupt_adapter_is_named_and_the_run_is_left_as_it_was(whole, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    manifest = json.loads((copy / "run.json").read_text())
    manifest["stages"].pop("grpo")
    (copy / "run.json").write_text(json.dumps(manifest))
    (copy / "sft" / "adapter" / "adapter_model.safetensors").write_bytes(b"broken")
    assert train.main([*SMALL, "--out", str(copy)]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_hostile_run_folder_runs_no_code(whole, tmp_path, capsys, name):
    out, owned = tmp_path / "run", tmp_path / "owned"
    shutil.copytree(whole, out)
    manifest = json.loads((out / "run.json").read_text())
    manifest["stages"] = {k: v for k, v in manifest["stages"].items() if not k.endswith("grpo")}
    (out / "run.json").write_text(json.dumps(manifest))
    shutil.rmtree(out / "grpo" / "checkpoint-3")
    checkpoint = out / "grpo" / "checkpoint-2"
    for file in (checkpoint / name, checkpoint / "training_args.bin"):
        assert file.exists()
        torch.save(Hostile(owned), file)
    files.mark_complete(checkpoint)
    assert train.main([*SMALL, "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "checkpoint-2" in error
    assert not owned.exists()


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_can_be_resumed(whole, disk, capsys):
    subprocess.run(["mount", "-o", "remount,size=3m", disk], check=True)
    assert train.main([*SMALL, "--out", str(disk / "run")]) == 3
    assert re.search("disk (is )?full", capsys.readouterr().err.splitlines()[-1])
    subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    assert train.main([*SMALL, "--out", str(disk / "run")]) == 0
    assert comparable(disk / "run")["adapter"] == comparable(whole)["adapter"]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("skips", [20, 2])
def test_float16_may_skip_steps_until_its_scale_is_found(tmp_path, monkeypatch, stage, skips):
    """With a real scaler, whose first scale overflows here as it does on a T4."""
    from bbkit import Unhealthy, grpo, models, sft
    from bbkit.runs import callback, record

    changed = [
        "retention.rule=none", f"{stage}.steps=16", "sft.batch_size=4", "sft.micro_batch_size=4",
        "grpo.prompts=2", "grpo.generations=2", "grpo.micro_batch_size=4",
        "grpo.max_completion_length=4", "grpo.combination=dual_cone",
    ]  # fmt: skip
    settings = config.load("pocket", None, changed)
    model, tokenizer = models.load(settings.model, lambda line: None)
    model = models.add_lora(model, settings.model, 0)
    monkeypatch.setattr(callback, "SKIPPED", skips)
    with record.Run(tmp_path / "run", config.to_dict(settings), ["python"]) as run:
        hooks = callback.Recorder(run, stage, settings)
        build = sft.build if stage == "sft" else grpo.build
        rows = data.load("ontology", "train")[:16]
        trainer = build(model, tokenizer, rows, settings, tmp_path / "run" / stage, [hooks])
        if stage == "grpo":  # rewards that differ
            trainer.reward_funcs[0] = lambda completions, **_: [
                len(c[0]["content"]) for c in completions
            ]
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
        if skips == 2:
            with pytest.raises(Unhealthy, match="overflowed in 2 steps in a row; lower"):
                hooks.train(trainer)
            return
        hooks.train(trainer)
    found = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("skipped", 0) for row in found][:2] == [1, 2] and "skipped" not in found[-1]
    assert ["grad_norm" in row for row in found] == ["skipped" not in row for row in found]


def test_every_preset_resolves():
    for preset in config.PRESETS:
        assert config.load(preset).grpo.generations >= 2


METHODS = [
    *(f"grpo.controller.rule={r}" for r in ("fixed", "deficit", "variance", "covariance")),
    "grpo.controller.rule=agreement",
    *(f"grpo.combination={c}" for c in ("pcgrad", "mgda", "upgrad", "aligned_mtl", "dual_cone")),
    "grpo.combination=random",
    *("grpo.metric=adam", "grpo.metric=step", "grpo.advantages=gdpo", "grpo.beta=0.05"),
    *(f"retention.rule={r}" for r in ("penalty", "step", "cone")),
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """An SFT that has learned enough for rewards to vary, which the methods go on from."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert train.main([*LONG, "--set", "grpo.steps=0", "--out", str(out)]) == 0
    return out


LONG = [
    "--preset", "pocket", "--stages", "sft,grpo", "--set", "sft.steps=60", "--set",
    "grpo.prompts=4", "--set", "grpo.generations=4", "--set", "grpo.micro_batch_size=16",
    "--set", "grpo.save_steps=50", "--set", "run.threads=1",
    "--set", "grpo.advantages=capability", "--set", "retention.rule=none",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_100_steps_and_resumes_to_the_same_bits(method, tuned, tmp_path):
    words = [*LONG, "--set", "grpo.steps=100"]
    if method.startswith("grpo.metric"):
        words += ["--set", "grpo.combination=dual_cone"]
    words += ["--set", method]
    settings = config.to_dict(config.load("pocket", None, words[5::2]))
    out, again = tmp_path / "whole", tmp_path / "again"
    if not method.startswith("retention"):  # whose SFT is another
        runner.fork(tuned, out, settings, ["python"])
    code, text, err = finish(start(*words, "--out", str(out)))
    assert code == 0, text + err
    shutil.copytree(out, again, ignore=shutil.ignore_patterns("checkpoint-100", "adapter"))
    shutil.copytree(out / "sft" / "adapter", again / "sft" / "adapter")
    manifest = json.loads((again / "run.json").read_text())
    del manifest["stages"]["grpo"]  # as if it had been cut off after step 50
    (again / "run.json").write_text(json.dumps(manifest))
    code, text, err = finish(start(*words, "--out", str(again)))
    assert code == 0 and "going on from step 50" in text, text + err
    file = "adapter/adapter_model.safetensors"
    assert (out / file).read_bytes() == (again / file).read_bytes()
    rows = [r for r in read_rows(out / "metrics.jsonl") if r["stage"] == "grpo"]
    assert [row["step"] for row in rows] == list(range(1, 101))
    kinds, moved = ("domain", "reasoning", "format"), False
    for row in rows:
        weights = [row[f"weight/{k}"] for k in kinds]
        assert abs(sum(weights) - 1) < 1e-6 and min(weights) >= 0.05 - 1e-9
        moved = moved or max(weights) - min(weights) > 0.01
        for part in ("reward", "sigma", "coefficient", "gradient_norm"):
            assert all(f"{part}/{k}" in row for k in kinds), part
        assert {"loss", "entropy", "unparsed", "gradient_engine", "seconds/combination"} <= set(row)
    assert moved == ("controller.rule=" in method and "fixed" not in method)


def test_a_place_to_report_to_that_is_not_installed_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["--preset", "pocket", "--set", "run.report_to=trackio", "--out", str(tmp_path / "run")]
    assert train.main(words) == 3 and not (tmp_path / "run").exists()
    assert "run.report_to=trackio: not installed here; pip install" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_an_own_reward_is_in_every_part_of_a_run_and_may_not_change(tmp_path, capsys):
    mine, out = tmp_path / "mine.py", tmp_path / "run"
    mine.write_text("def brevity(example, reply):\n    return max(0.0, 1 - len(reply) / 300)\n")
    asked = ["--set", f"grpo.rewards=domain,reasoning,format,{mine}:brevity"]
    words = [*SMALL, *asked, "--set", "grpo.weights.brevity=0.5", "--out", str(out)]
    assert train.main(words) == 0
    last = read_rows(out / "metrics.jsonl")[-1]
    kinds = ("reward", "sigma", "weight", "coefficient", "gradient_norm", "cosine/format")
    assert {f"{kind}/brevity" for kind in kinds} <= set(last)
    assert all("brevity" in row["rewards"] for row in read_rows(out / "samples.jsonl"))
    results = files.read_json(out / "evaluation.json")
    low, high = results["grpo"]["brevity"]["interval"]
    assert low <= results["grpo"]["brevity"]["value"] <= high
    assert "brevity" in results["difference"]["grpo-sft"]
    assert "| brevity | 24 |" in (out / "report.md").read_text()
    assert len(files.read_json(out / "run.json")["rewards"][str(mine)]) == 64
    mine.write_text(mine.read_text().replace("300", "299"))
    assert train.main(words) == 2
    assert "mine.py was" in (said := capsys.readouterr().err) and "cannot resume" in said


def test_an_own_reward_that_cannot_serve_ends_before_a_model_is_loaded(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(models, "load", None)
    mine = tmp_path / "mine.py"
    mine.write_text("def worse(example, reply):\n    return 1 + len(reply)\n")
    out = tmp_path / "run"
    words = [*SMALL, "--set", f"grpo.rewards={mine}:worse", "--out", str(out)]
    assert train.main(words) == 2 and not out.exists()
    assert capsys.readouterr().err.count("\n") == 1
