"""Arms that share their SFT: what is carried over, what is refused, the table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bbkit import config, recorded, study
from bbkit.config import InputError
from bbkit.files import read_json, read_rows

TINY = [
    f"--set={item}"
    for item in (
        "sft.steps=2", "sft.batch_size=8", "sft.micro_batch_size=8", "grpo.steps=2",
        "grpo.prompts=4", "grpo.generations=4", "grpo.micro_batch_size=16", "run.threads=1",
        "evaluation.questions=6", "evaluation.instructions=6", "evaluation.max_new_tokens=16",
        "evaluation.bootstrap=50",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    assert study.main(["--arms", "grpo,full", "--seeds", "0", "--out", str(out), *TINY]) == 0
    return out


def test_arms_share_the_sft_and_differ_in_grpo(made):
    runs = {name: made / f"{name}-0" for name in ("sft", "grpo", "full")}
    file = "adapter/adapter_model.safetensors"
    assert len({(run / "sft" / file).read_bytes() for run in runs.values()}) == 1
    assert len({(run / file).read_bytes() for run in runs.values()}) == 3
    for arm in ("grpo", "full"):
        manifest = read_json(runs[arm] / "run.json")
        assert manifest["forked_from"] == "sft-0" and manifest["status"] == "done"
        assert manifest["settings"]["grpo"]["steps"] == 2 and "--out" in manifest["command"]
        rows = read_rows(runs[arm] / "metrics.jsonl")
        assert [r["stage"] for r in rows] == ["sft"] * 2 + ["grpo"] * 2
        assert set(read_json(runs[arm] / "evaluation.json")) >= {"base", "sft", "grpo", "kl"}
    assert not list(made.glob(".*"))


def test_an_arm_alone_is_the_same_run(made, tmp_path):
    """The shared SFT is what the arm's own command would have trained."""
    from bbkit import train

    words = read_json(made / "full-0" / "run.json")["command"].split()[3:]
    words[words.index("--out") + 1] = str(tmp_path / "alone")
    assert train.main(words) == 0
    for part in ("adapter/adapter_model.safetensors", "evaluation.json"):
        assert (tmp_path / "alone" / part).read_bytes() == (made / "full-0" / part).read_bytes()


def test_again_only_the_table_is_made(made, capsys):
    assert study.main(["--arms", "grpo,full", "--seeds", "0", "--out", str(made), *TINY]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split("|")[1].strip() for line in lines] == [
        "%", "---", "base", "SFT", "grpo", "full", "full − grpo",
    ]  # fmt: skip
    assert len({line.count("|") for line in lines}) == 1


def test_the_noise_of_each_arms_scheme_is_beside_it(made, tmp_path):
    runs = {}
    for seed, ratio in ((0, 0.5), (1, 2.0), (2, None)):
        row = {"ratio": ratio, "interval": [ratio / 2, ratio * 2] if ratio else [None, None]}
        runs[f"sft-{seed}"] = {"noise": {"capability + dual_cone": row, "gdpo": row}}
        section = {"advantages": "capability", "combination": "dual_cone"}
        runs[f"full-{seed}"] = {"from": f"sft-{seed}", "grpo": section}
    kept = {"runs": runs}
    cell = study.noise_cell(kept, ["full-0", "full-1"])
    assert cell == "1.00 [0.61, 1.63]"  # half of the log interval: log 2 / √2
    assert study.noise_cell(kept, ["full-0", "full-2"]) == ""  # no signal beyond the noise
    runs["sft-0"]["noise"] = None
    assert study.noise_cell(kept, ["full-0"]) == ""  # not probed


def test_a_record_gives_the_table_again_and_is_small(made, tmp_path, capsys):
    words = ["--table", "--arms", "grpo,full", "--seeds", "0", "--out", str(made)]
    assert study.main([*words, "--record", str(tmp_path / "study.json")]) == 0
    kept = read_json(tmp_path / "study.json")
    assert study.table(kept) == capsys.readouterr().out.strip()
    assert kept["runs"]["full-0"]["command"].startswith("python -m bbkit.train")
    assert "reply" not in (tmp_path / "study.json").read_text()
    rows = read_rows(made / "full-0" / "evaluation" / "grpo.jsonl")
    again = recorded.unpack(kept, "full-0")
    assert set(again) == {"base", "sft", "grpo"}
    for ours, row in zip(again["grpo"], rows, strict=True):
        assert all(ours[name] == row[name] for name in recorded.ITEM)
        known = {k: v for k, v in row["scores"].items() if v is not None}
        assert ours["scores"] == pytest.approx(known, rel=1e-3)


def test_the_readmes_table_is_that_of_the_recorded_study():
    """Stale? python -m bbkit.study --table --record notebooks/recorded/pocket.json prints it."""
    root = Path(__file__).parents[1]
    text = (root / "README.md").read_text()
    shown = text.partition("<!-- table: study -->\n")[2].partition("\n\n")[0]
    assert shown == study.table(read_json(root / "notebooks" / "recorded" / "pocket.json"))


def test_a_finished_arm_of_other_settings_is_not_taken_for_this_one(made, capsys):
    words = ["--arms", "grpo,full", "--seeds", "0", "--out", str(made), *TINY]
    assert study.main([*words, "--set", "grpo.steps=3"]) == 2
    assert "grpo-0: grpo.steps was 2 and is now 3" in capsys.readouterr().err


def test_what_is_missing_is_said(made, capsys):
    assert study.main(["--table", "--arms", "gdpo,grpo", "--seeds", "0,1", "--out", str(made)]) == 0
    out = capsys.readouterr().out
    assert "not in the table: gdpo-0, gdpo-1, grpo-1" in out and "| grpo |" in out


def test_an_interrupted_study_waits_for_its_run_and_says_how_to_go_on(tmp_path):
    code = (  # a job in the background begins with Ctrl-C ignored
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from bbkit import study\nsys.exit(study.main(sys.argv[1:]))"
    )
    words = ["-c", code, "--arms", "grpo", "--seeds", "0", "--out", str(tmp_path), *TINY]
    study_ = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "sft-0" / "run.json").exists() and study_.poll() is None:
        time.sleep(0.1)
    os.killpg(study_.pid, signal.SIGINT)  # as a terminal does
    _, err = study_.communicate(timeout=300)
    assert study_.returncode == 130 and "the same command goes on" in err
    assert "Traceback" not in err


def test_another_sft_is_not_carried_over(made, tmp_path):
    settings = config.to_dict(config.load("pocket", None, ["sft.steps=3"]))
    with pytest.raises(InputError, match=r"cannot go on from its SFT, "):
        study.fork(made / "sft-0", tmp_path / "arm", settings, ["python"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "grpo,ful"], "no arm 'ful'; use grpo"),
        (["--seeds", "0,a"], "--seeds 0,a"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys):
    assert study.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_every_arm_resolves():
    for overrides in study.ARMS.values():
        assert json.dumps(config.to_dict(config.load("pocket", None, [*overrides])))
