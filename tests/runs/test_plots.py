"""Figures and the report, from a made-up run folder that looks like a real one."""

import math
import random
import re
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from bbkit.config import load, to_dict
from bbkit.machine.files import write_json
from bbkit.runs import plots, report
from bbkit.runs.record import Run

MEASURES = {  # base, SFT, GRPO
    "domain": (0.0, 0.61, 0.69),
    "domain_lenient": (0.25, 0.68, 0.74),
    "reasoning": (0.0, 0.78, 0.83),
    "format": (0.02, 0.93, 0.97),
    "instruction": (0.74, 0.45, 0.62),
    "instruction_unseen": (0.71, 0.49, 0.58),
    "unparsed": (0.97, 0.06, 0.02),
}
N = {"instruction": 247, "instruction_unseen": 96}


def measure(value: float, n: int, signed: bool = False) -> dict:
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.01) / n)
    low, high = value - half, value + half
    interval = [low, high] if signed else [max(0.0, low), min(1.0, high)]
    return {"value": value, "n": n, "interval": interval}


def fake_run(folder: Path, stages=("base", "sft", "grpo"), steps=80) -> Path:
    """A run folder as `bbkit.train` leaves it, with noise, Nones and awkward replies."""
    draw = random.Random(0)
    command = ["python", "-m", "bbkit.train", "--preset", "pocket"]
    settings = load("pocket", overrides=["sft.learning_rate=4e-3"])
    with Run(folder, to_dict(settings), command) as run:
        for step in range(1, 101):
            run.log("sft", step, {"loss": 0.2 + 2 * math.exp(-step / 25) + draw.gauss(0, 0.05)})
        for step in range(1, steps + 1):
            level = step / steps
            row = {"loss": 0.0, "kl": None, "entropy": 0.25 - 0.1 * level, "unparsed": 0.05}
            for name, start, gain in (("domain", 0.32, 0.15), ("reasoning", 0.6, 0.1)):
                row[f"reward/{name}"] = start + gain * level + draw.gauss(0, 0.04)
                row[f"weight/{name}"] = 1 / 3
            row |= {
                "reward/format": 0.7 + 0.2 * level + draw.gauss(0, 0.03),
                "weight/format": 1 / 3,
            }
            row |= {f"coefficient/{k}": 0.3 + 0.1 * level for k in ("domain", "reasoning")}
            row["cosine/domain/reasoning"] = draw.gauss(0.3, 0.3)
            if step % 3:  # absent where a reward did not vary
                row["cosine/domain/format"] = draw.gauss(-0.1, 0.2)
            run.log("grpo", step, row | {"seconds/generate": 1.5})
        for index, stage in enumerate(stages):
            values = {k: measure(v[index], N.get(k, 232)) for k, v in MEASURES.items()}
            run.evaluation({stage: values})
            for item in range(4):
                reply = "Yes, ```sure``` | I can." if stage == "base" else "<answer>BCG</answer>"
                sample = {"prompt": f"Which agent causes disease {item}?"}
                sample |= {"reply": reply * (60 if item == 1 else 1), "gold": "BCG"}
                sample |= {"rewards": {"domain": 1.0, "reasoning": None, "format": 0.5}}
                run.sample(stage, 100, sample, held_out=True)
            run.done(stage, seconds=60.0 + index)
        if len(stages) == 3:
            baseline = {"guess_by_name": 0.37, "majority": 0.12, "chance": 0.25}
            run.evaluation({"baseline": {k: measure(v, 232) for k, v in baseline.items()}})
            pairs = {"sft-base": (0, 1), "grpo-sft": (1, 2)}
            difference = {
                key: {k: measure(v[b] - v[a], N.get(k, 232), True) for k, v in MEASURES.items()}
                for key, (a, b) in pairs.items()
            }
            difference["grpo-sft"]["format"]["interval"] = [-0.01, 0.09]
            run.evaluation({"difference": difference})
            nats = {"value": 0.25, "n": 64, "interval": [0.2, 0.31]}
            run.evaluation({"kl": {"sft": nats, "grpo_instruction": nats}})
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def text(run_folder):
    return report.write(run_folder).read_text()


def test_report_has_every_figure_and_number(text, run_folder):
    for name in ("before_after", "front", "rewards"):
        assert f"](figures/{name}.png)" in text
        assert (run_folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    row = next(line for line in text.splitlines() if line.startswith("| domain accuracy |"))
    assert "61.0 [54.7, 67.3]" in row and "| 232 |" in row
    assert "guess by name 37.0" in text and "python -m bbkit.train --preset pocket" in text
    assert "KL to the base after SFT, question replies: 0.250 [0.200, 0.310] nats" in text
    assert "KL to the base after GRPO, instruction replies: 0.250" in text
    assert "python " in text and "rate 0.004" in text and "base 1.0" in text


def test_tax_and_bold_follow_the_numbers(text):
    assert "Alignment tax after SFT, instruction following: 29.0 points" in text
    assert "Alignment tax after GRPO, instruction following: 12.0 points" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:2] == "| "}
    assert "**-29.0" in rows["instruction following"]  # the interval excludes 0
    assert "**" not in rows["format"].split("|")[-2]  # it does not
    assert all(line.count("|") == 8 for line in text.splitlines() if line[:2] == "| ")


def test_replies_cannot_break_out_of_their_fence(text):
    assert "````text\nYes, ```sure``` | I can.\n````" in text
    assert re.search(r"… \(\d+ characters\)", text)


def test_same_prompt_is_shown_once_with_all_stages(text):
    assert text.count("Which agent causes disease 0?") == 1
    assert text.count("**SFT** (domain 1, format 0.5)") == 3


def test_captions_say_what_to_notice(text):
    captions = [line for line in text.splitlines() if line.startswith("![")]
    assert len(captions) == 4 and all("Notice" in caption for caption in captions)
    assert "(SFT 29, GRPO 12 points)" in text


def test_axes_are_named_and_colours_kept(run_folder):
    for make in plots.FIGURES.values():
        labels = [axis.get_ylabel() for axis in make(run_folder).axes]
        assert all(labels)
    lines = plots.rewards(run_folder).axes[0].get_lines()
    assert {line.get_color() for line in lines} == {plots.COLORS[k] for k in plots.COLORS} - {
        plots.COLORS["instruction"],
        plots.COLORS["retention"],
    }
    assert len(set(plots.COLORS.values())) == len(plots.COLORS)


def test_bars_have_the_heights_of_the_evaluation(run_folder):
    axis = plots.before_after(run_folder).axes[0]
    heights = sorted(round(bar.get_height()) for bar in axis.patches)
    wanted = sorted(round(100 * v) for k in plots.SHOWN for v in MEASURES[k])
    assert heights == wanted
    colors = {to_hex(bar.get_facecolor()).upper() for bar in axis.patches}
    assert colors == {plots.color(measure) for measure in plots.SHOWN}
    (run_folder / "run.json").unlink()  # notebook 02 has results and no run
    assert len(plots.before_after(run_folder).axes[0].patches) == len(axis.patches)


@pytest.mark.parametrize("stages", [(), ("base",), ("base", "sft")])
def test_unfinished_runs_have_a_report_too(tmp_path, stages):
    text = report.write(fake_run(tmp_path, stages, steps=0)).read_text()
    assert "rewards.png" not in text
    assert ("Not evaluated yet" in text) == (not stages)
    assert ("Alignment tax" in text) == (len(stages) > 1)


def test_odd_evaluations_do_not_stop_the_report(tmp_path):
    fake_run(tmp_path, steps=1)
    one = {"value": 0.5, "n": 3}  # no interval; a measure of another kit
    write_json(tmp_path / "evaluation.json", {"base": {"domain": one, "ifeval_strict": one}})
    text = report.write(tmp_path).read_text()
    assert "| ifeval_strict | 3 | 50.0 |" in text
    assert "reasoning validity" not in text


@pytest.mark.parametrize("count", [1, 4, 8, 20])
def test_every_reward_of_a_run_has_its_look_and_its_name_everywhere(tmp_path, count):
    names = ["domain", "reasoning", "format", *(f"own{i}" for i in range(20))][:count]
    asked = [name if name in plots.COLORS else f"my.py:{name}" for name in names]
    settings = to_dict(load("pocket", overrides=[f"grpo.rewards={','.join(asked)}",
                                                 "grpo.controller.floor=0.01"]))  # fmt: skip
    with Run(tmp_path, settings, ["a"]) as run:
        for step in (1, 2, 3):
            row = {f"{kind}/{name}": 0.5 for kind in ("reward", "weight") for name in names}
            row |= {f"coefficient/{name}": 0.1 for name in names}
            pairs = [(a, b) for i, b in enumerate(names) for a in names[:i]]
            run.log("grpo", step, row | {f"cosine/{a}/{b}": -0.2 for a, b in pairs})
        run.evaluation({"grpo": {name: measure(0.5, 50) for name in names}})
    text = report.write(tmp_path).read_text()
    for name in names:
        assert f"| {plots.NAMES.get(name, name)} | 50 |" in text
    assert f"rewards: {', '.join(asked)}" in text
    looks = plots.looks(names)
    assert len({(look["color"], look["ls"]) for look in looks.values()}) == count
    assert all(looks[name]["color"] == plots.COLORS[name] for name in names[:3])
    top, below = plots.rewards(tmp_path).axes
    told = [label.get_text() for label in top.get_legend().get_texts()]
    assert told == names and len(below.get_lines()) == count
    ticks = plots.before_after(tmp_path).axes[0].get_xticklabels()
    shown = {t.get_text().partition("\n")[0] for t in ticks}
    assert {name for name in names if name not in plots.NAMES} <= shown
    cosines = plots.gradients(tmp_path)
    assert (cosines is None) == (count == 1)
    if cosines:
        legend = cosines.axes[0].get_legend().get_texts()
        assert len(legend) == count * (count - 1) // 2 and "100%" in cosines.get_supxlabel()


def test_eight_of_a_users_own_have_eight_colours():
    looks = plots.looks([f"own{i}" for i in range(9)])
    assert len({look["color"] for look in looks.values()}) == 8
    assert looks["own8"] == looks["own0"] | {"ls": "--"}
