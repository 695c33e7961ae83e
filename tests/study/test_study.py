"""Arms that share their SFT: what is carried over, what is refused, the table."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import TINY
from safetensors.torch import load_file

from bbkit import InputError, Unhealthy, config, train
from bbkit.machine.files import read_json, read_rows
from bbkit.study import arms, comparison, recorded, runner

TWO = ["--arms", "grpo,conflict_orthogonal", "--seeds", "0"]  # the second has a reward of its own


class Here:
    """A run in this process, where a study would start one: that takes ten seconds."""

    def __init__(self, words, *_):
        self.returncode = train.main(words[3:])

    def poll(self):
        return self.returncode


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_start", Here)
        patch.setattr("bbkit.runs.report.draw", lambda folder: {})
        assert runner.main([*TWO, "--out", str(out), *TINY]) == 0
    return out


def test_arms_share_the_sft_and_differ_in_grpo(made):
    runs = {name: made / f"{name}-0" for name in ("sft", "grpo", "conflict_orthogonal")}
    file = "adapter/adapter_model.safetensors"
    assert len({(run / "sft" / file).read_bytes() for run in runs.values()}) == 1
    assert len({(run / file).read_bytes() for run in runs.values()}) == 3
    for arm in ("grpo", "conflict_orthogonal"):
        manifest = read_json(runs[arm] / "run.json")
        assert manifest["forked_from"] == "sft-0" and manifest["status"] == "done"
        assert manifest["settings"]["grpo"]["steps"] == 2 and "--out" in manifest["command"]
        rows = read_rows(runs[arm] / "metrics.jsonl")
        assert [r["stage"] for r in rows] == ["sft"] * 2 + ["grpo"] * 2
        assert set(read_json(runs[arm] / "evaluation.json")) >= {"base", "sft", "grpo", "kl"}
    assert not list(made.glob(".*"))


@pytest.mark.usefixtures("undrawn")
def test_an_arm_alone_is_the_same_run(made, tmp_path):
    """The shared SFT is what the arm's own command would have trained."""
    words = shlex.split(read_json(made / "conflict_orthogonal-0" / "run.json")["command"])[3:]
    words[words.index("--out") + 1] = str(tmp_path / "alone")
    assert train.main(words) == 0
    one, other = tmp_path / "alone", made / "conflict_orthogonal-0"
    file = "adapter/adapter_model.safetensors"
    assert (one / file).read_bytes() == (other / file).read_bytes()
    ours, theirs = (read_json(run / "evaluation.json") for run in (one, other))
    assert ours["grpo"] == theirs["grpo"] and "brevity" in theirs["grpo"]
    assert "brevity" in ours["sft"]  # which the shared SFT was not asked


def test_again_only_the_table_is_made(made, capsys):
    assert runner.main([*TWO, "--out", str(made), *TINY]) == 0
    said, _, table = capsys.readouterr().out.strip().partition("\n")
    assert said == "3 runs, all there"
    lines = table.partition("\n\n")[0].splitlines()
    assert [line.split("|")[1].strip() for line in lines] == [
        "%", "---", "base", "sft", "grpo", "conflict_orthogonal",
    ]  # fmt: skip
    assert len({line.count("|") for line in lines}) == 1


def test_a_record_gives_the_table_again_and_is_small(made, tmp_path, capsys):
    words = ["--table", *TWO, "--out", str(made)]
    assert runner.main([*words, "--record", str(tmp_path / "study.json")]) == 0
    kept = read_json(tmp_path / "study.json")
    told = comparison.page(kept)
    assert told == capsys.readouterr().out.strip()
    assert kept["runs"]["conflict_orthogonal-0"]["command"].startswith("python -m bbkit.train")
    rows = read_rows(made / "conflict_orthogonal-0" / "evaluation" / "grpo.jsonl")
    text = (tmp_path / "study.json").read_text()
    told = ("instruction", "elsewhere")  # whose ids, and whose names, are in the record
    assert not any(row["question"] in text for row in rows if row["task"] not in told)
    first = rows[0]
    told = kept["runs"]["conflict_orthogonal-0"]["replies"]["grpo"][first["source"]]
    assert told == {"id": first["id"], "reply": first["reply"]}
    again = recorded.unpack(kept, "conflict_orthogonal-0")
    assert set(again) == {"base", "sft", "grpo"}
    for ours, row in zip(again["grpo"], rows, strict=True):
        assert all(ours[name] == row[name] for name in recorded.ITEM)
        known = {k: v for k, v in row["scores"].items() if v is not None}
        assert ours["scores"] == pytest.approx(known, rel=1e-3)


def test_a_record_is_added_to_but_not_changed(made, tmp_path, capsys):
    file = tmp_path / "study.json"
    words = ["--table", "--seeds", "0", "--out", str(made), "--record", str(file)]
    for chosen in ("grpo", "grpo,conflict_orthogonal"):
        assert runner.main([*words, "--arms", chosen]) == 0
    kept = recorded.read(file)
    assert set(kept["runs"]) == {"sft-0", "grpo-0", "conflict_orthogonal-0"}
    scores = kept["runs"]["sft-0"]["scores"]["sft"]
    scores["domain"] = scores["domain"].translate(str.maketrans("01", "10"))
    file.write_text(recorded.as_json(kept))
    assert runner.main([*words, "--arms", "conflict_orthogonal"]) == 2
    assert "sft-0 scored otherwise there" in capsys.readouterr().err
    scores["domain"] = scores["domain"].translate(str.maketrans("01", "10"))
    kept["runs"]["conflict_orthogonal-5"] = kept["runs"]["conflict_orthogonal-0"] | {
        "retention": {"rule": "step"}
    }
    file.write_text(recorded.as_json(kept))
    assert runner.main([*words, "--arms", "conflict_orthogonal"]) == 2
    assert (
        "conflict_orthogonal-5 keeps replies otherwise than conflict_orthogonal-0"
        in capsys.readouterr().err
    )
    file.write_text("[]")
    assert runner.main([*words, "--arms", "conflict_orthogonal"]) == 2
    assert "not a record" in capsys.readouterr().err


def test_a_finished_arm_of_other_settings_is_not_taken_for_this_one(made, capsys):
    words = [*TWO, "--out", str(made), *TINY]
    assert runner.main([*words, "--set", "grpo.steps=3"]) == 2
    assert "grpo-0: grpo.steps was 2 and is now 3" in capsys.readouterr().err


def test_the_decisive_study_is_one_command(tmp_path, capsys):
    assert runner.main(["--decisive", "--table", "--out", str(tmp_path)]) == 0
    named = capsys.readouterr().out.strip().partition("table: ")[2].split(", ")
    assert len(named) == len(set(named)) and named[0] == "averaging-200"
    assert {n.rpartition("-")[2] for n in named if n.startswith("full-")} == {
        str(seed) for seed in range(200, 212)
    }
    assert sum(name.startswith("penalty_weight_1-") for name in named) == 20


def test_what_is_missing_is_said(made, capsys):
    assert (
        runner.main(["--table", "--arms", "gdpo,grpo", "--seeds", "0,1", "--out", str(made)]) == 0
    )
    out = capsys.readouterr().out
    assert "not in the table: gdpo-0, gdpo-1, grpo-1" in out and "| grpo |" in out


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_waits_for_its_run_and_says_how_to_go_on(tmp_path, sent):
    code = (  # a job in the background begins with Ctrl-C ignored
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from bbkit.study import runner\nsys.exit(runner.main(sys.argv[1:]))"
    )
    words = ["-c", code, "--arms", "grpo", "--seeds", "0", "--out", str(tmp_path), *TINY]
    study_ = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "sft-0" / "run.json").exists() and study_.poll() is None:
        time.sleep(0.1)
    time.sleep(1)  # the folder is held a moment after its manifest is there
    if sent == signal.SIGINT:
        os.killpg(study_.pid, sent)  # as a terminal does
    else:
        study_.send_signal(sent)  # as a scheduler does
    _, err = study_.communicate(timeout=300)
    assert study_.returncode == 130 and "the same command goes on" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "sft-0" / "run.json").read_text())["status"] == "interrupted"


def test_another_sft_is_not_carried_over(made, tmp_path):
    settings = config.to_dict(config.load("pocket", None, ["sft.steps=3"]))
    with pytest.raises(InputError, match=r"cannot go on from its SFT, "):
        runner.fork(made / "sft-0", tmp_path / "arm", settings, ["python"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "grpo,ful"], "no arm 'ful'; use averaging"),
        (["--seeds", "0,a"], "--seeds 0,a"),
        (["--jobs", "0"], "--jobs 0: 1 or more"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys):
    assert runner.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_an_arm_goes_on_from_the_sft_that_keeps_as_it_does(tmp_path):
    rows = {row.folder.name: row for row in arms.schedule(["alone_full", "alone"], [7], tmp_path)}
    assert list(rows) == ["sft-7", "step-7", "alone_full-7", "alone-7"]
    assert rows["alone_full-7"].shared == tmp_path / "step-7"
    assert rows["step-7"].shared is None and rows["alone-7"].shared == tmp_path / "sft-7"


@pytest.mark.usefixtures("undrawn")
def test_an_arm_with_an_sft_of_its_own_is_in_the_table(made, capsys, monkeypatch):
    monkeypatch.setattr(runner, "_start", Here)
    words = ["--arms", "grpo,averaging", "--seeds", "0", "--out", str(made), *TINY]
    assert runner.main(words) == 0
    out = capsys.readouterr().out
    assert "3 runs, 1 to do" in out and "averaging-0\n" in out
    assert "| averaging | 1 |" in out
    file = "sft/adapter/adapter_model.safetensors"
    tuned, mean = (load_file(made / name / file) for name in ("sft-0", "averaging-0"))
    for name, tensor in tuned.items():
        assert mean[name].equal(tensor * (0.5 if ".lora_B." in name else 1.0))


def test_quick_is_two_arms_over_two_seeds(tmp_path, monkeypatch, capsys):
    asked = []

    def noted(args, row):
        asked.append((row.folder.name, args.set))
        return iter(())

    monkeypatch.setattr(runner, "_commands", noted)
    assert runner.main(["--quick", "--out", str(tmp_path), "--set", "run.threads=1"]) == 0
    arms = ("sft", "grpo", "step", "full")  # the whole method goes on from an SFT that keeps too
    assert [name for name, _ in asked] == [f"{arm}-{seed}" for seed in (0, 1) for arm in arms]
    assert asked[0][1] == ["grpo.steps=15", "grpo.save_steps=15", "run.threads=1"]
    minutes = int(re.search(r"8 to do \(about (\d+) minutes", capsys.readouterr().out)[1])
    assert minutes < 15


def test_every_arm_resolves():
    for overrides in arms.ARMS.values():
        assert json.dumps(config.to_dict(config.load("pocket", None, [*overrides])))


SPAN = """
import signal, sys, time
def stop(*_):
    open(sys.argv[1] + ".stopped", "w").close()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
began = time.monotonic()
time.sleep(float(sys.argv[2]))
print(began, time.monotonic(), file=open(sys.argv[1] + ".span", "w"))
sys.exit(int(sys.argv[3]))
"""


def stand_ins(monkeypatch, seconds: dict[str, float], codes: dict[str, int]) -> None:
    """Commands that take so long and end with such a code, in place of runs."""

    def commands(args, row):
        name = row.folder.name
        told = (str(row.folder), str(seconds.get(name, 0.3)), str(codes.get(name, 0)))
        yield ["python", "-c", SPAN, *told]

    monkeypatch.setattr(runner, "_commands", commands)


def test_jobs_run_side_by_side_and_after_what_they_go_on_from(tmp_path, monkeypatch):
    stand_ins(monkeypatch, {}, {})
    rows = arms.schedule(["alone_step", "grpo", "static"], [0, 1], tmp_path)
    runner._run_all(runner.parser().parse_args(["--jobs", "3"]), rows)
    spans = {
        row.folder: [float(x) for x in row.folder.with_suffix(".span").read_text().split()]
        for row in rows
    }
    for row in rows:
        if row.shared:
            assert spans[row.folder][0] >= spans[row.shared][1]
    at_once = [sum(a <= began < b for a, b in spans.values()) for began, _ in spans.values()]
    assert 2 <= max(at_once) <= 3


def test_where_one_of_several_jobs_fails_the_others_are_told_to_stop(tmp_path, monkeypatch):
    stand_ins(monkeypatch, {"static-0": 60}, {"grpo-0": 4})
    rows = arms.schedule(["static", "grpo"], [0], tmp_path)
    with pytest.raises(Unhealthy, match=r"grpo-0: its run ended with exit code 4; see .*0[.]log"):
        runner._run_all(runner.parser().parse_args(["--jobs", "2"]), rows)
    assert (tmp_path / "static-0.stopped").exists()
