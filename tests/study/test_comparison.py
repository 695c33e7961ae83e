"""Arms against each other: intervals over seeds and prompts, tables and figures of a record."""

import itertools
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from bbkit.machine.files import read_json
from bbkit.runs import statistics
from bbkit.study import comparison, effects, reasons, recorded, studyplots, verdicts

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "notebooks" / "recorded" / "pocket.json"


@cache
def shipped(name):
    """A record that ships with the kit, read once; nobody changes it."""
    return recorded.read(RECORDED.parent / f"{name}.json")


def rows(domain, general, kl=0.1):
    """Item rows of one model: questions of a disease each, general instructions."""
    asked = [
        {"id": f"q{i}", "task": "short", "entity": f"d{i}", "source": "s", "kl": kl}
        | {"scores": {"domain": value}}
        for i, value in enumerate(domain)
    ]
    return asked + [
        {"id": f"i{i}", "task": "instruction", "entity": "k", "source": "s", "kl": kl}
        | {"scores": {"instruction_unseen": value}}
        for i, value in enumerate(general)
    ]


def record(**arms):
    """A record of arms, each a list over seeds of (domain, general) scores of its last model."""
    items = [
        ["q0", "short", "d0", "s"],
        ["q1", "short", "d1", "s"],
        ["i0", "instruction", "k", "s"],
    ]
    runs = {}
    for arm, seeds in arms.items():
        for seed, (domain, general) in enumerate(seeds):
            last = {"domain": [*domain, None], "instruction_unseen": [None, None, general]}
            stage = "sft" if arm in ("sft", "averaging") else "grpo"
            scores = {stage: last | {"kl": [0.1] * 3}}
            if stage == "sft":
                base = {"domain": [0, 0, None], "instruction_unseen": [None, None, 1]}
                scores = {"base": base, **scores}
            runs[f"{arm}-{seed}"] = {
                "from": None if stage == "sft" else f"sft-{seed}",
                "scores": scores, "noise": None,
                "grpo": {"advantages": "grpo", "combination": "sum"} if stage == "grpo" else None,
            }  # fmt: skip
    return {"items": items, "runs": runs}


def test_an_interval_over_seeds_and_clusters_covers_both():
    """Values of a known two-way variance: the bootstrap's, without its known excess, is theirs."""
    rng = np.random.default_rng(0)
    runs, clusters = 12, 300
    seeds, items = rng.normal(0, 1, (runs, 1)), rng.normal(0, 3, (1, clusters))
    values = seeds + items
    table = np.stack([values, np.ones_like(values)], axis=2)
    found = statistics.crossed(table, 4000)
    assert found[0] == pytest.approx(values.mean())
    expected = seeds.var() / runs + items.var() / clusters
    assert found[1:].var() == pytest.approx(expected, rel=0.1)
    one = statistics.crossed(table[:1], 4000)  # one run: over clusters alone
    assert one[1:].var() == pytest.approx(items.var() / clusters, rel=0.1)


def test_differences_of_arms_are_paired():
    """Arms that differ by the same amount everywhere differ by it without any doubt."""
    rng = np.random.default_rng(1)
    low = [rows(rng.random(20) / 2, rng.random(20) / 2) for _ in range(3)]
    high = [
        [r | {"scores": {k: v + 0.25 for k, v in r["scores"].items()}} for r in run] for run in low
    ]
    change = effects.draws(high)["domain"] - effects.draws(low)["domain"]
    assert change == pytest.approx(np.full(2001, 0.25))


def test_an_arm_is_compared_on_the_seeds_that_both_have():
    kept = record(
        sft=[((0, 0), 1)] * 3, grpo=[((1, 0), 1), ((0, 0), 1), ((0, 0), 1)], full=[((1, 1), 1)] * 2
    )
    change, seeds = effects.change(effects.by_arm(kept), "grpo", "full")
    assert seeds == 2 and change["domain"][0] == 0.75
    assert effects.change(effects.by_arm(kept), "grpo", "gdpo") == ({}, 0)
    change, seeds = effects.change(effects.by_arm(kept), "base", "full")
    assert seeds == 2 and change["domain"][0] == 1.0


def test_each_data_set_is_told_apart():
    kept = record(sft=[((0, 0), 0)], grpo=[((1, 0), 1)])
    assert comparison.sources(kept) == ""  # one data set: nothing to tell apart
    kept["items"][1][3] = "other"
    lines = comparison.sources(kept).splitlines()
    assert lines[0] == "| % | other | s |"
    assert [cell.split()[0] for cell in lines[-1].split(" | ")[1:]] == ["0.0", "100.0"]
    assert comparison.changes(kept) in comparison.page(kept)


def test_noise_is_joined_over_the_seeds_that_show_a_signal():
    runs = {}
    for seed, ratio in ((0, 0.5), (1, 2.0), (2, None)):
        row = {"ratio": ratio, "interval": [ratio / 2, ratio * 2] if ratio else [None, None]}
        parts = {"low": 2.0, "high": 1.0}
        noise = {"capability + dual_cone": row | parts, "grpo": row | {"low": 1.0, "high": 1.0}}
        runs[f"sft-{seed}"] = {"noise": noise, "from": None, "grpo": None}
        section = {"advantages": "capability", "combination": "dual_cone"}
        runs[f"full-{seed}"] = {"from": f"sft-{seed}", "grpo": section}
    kept = {"runs": runs}
    found = effects.noise_ratio(kept, "full")
    runs["full_adam-0"] = {"from": "sft-0", "grpo": section | {"metric": "adam"}}
    assert effects.noise_ratio(kept, "full_adam") is None  # other inner products than the probe's
    assert comparison.ratio_cell(found) == "1.00 [0.61, 1.63]"  # half of the log interval: log 2/√2
    assert found["n"] == 2
    by_entropy = effects.noise_by_entropy(kept, "full")
    assert by_entropy["value"] == pytest.approx(0.5) and by_entropy["n"] == 2
    assert "| over all groups | 1.00 [0.61, 1.63] | 2 |" in comparison.variance(kept)
    runs["sft-0"]["noise"] = runs["sft-1"]["noise"] = None
    assert effects.noise_ratio(kept, "full") is None
    assert effects.noise_by_entropy(kept, "full") is None


PAGE = {
    "decisive": (
        *verdicts.FAMILIES,
        *(f"scores of {r}" for r in reasons.REGIMES),
        "untaxed",
        "steps",
    ),
    "pocket": ("arms", "variance"),
    "smollm2": ("arms", "changes", "sources"),
    "retention": ("tax sft", "tax grpo"),
    "retention_smollm2": ("tax sft",),
}


@pytest.mark.parametrize(
    ("page", "name", "blocks"),
    [(ROOT / "README.md", "decisive", ("title",))]
    + [(RECORDED.parent / "README.md", *pair) for pair in PAGE.items()],
)
def test_pages_say_what_the_records_say(page, name, blocks):
    """Stale? python -m bbkit.study.comparison notebooks/recorded/NAME.json --write PAGE"""
    text = page.read_text(encoding="utf-8")
    for block in blocks:
        assert text.count(f"<!-- {name} {block} -->\n") == 1, block
    assert text.count(f"<!-- {name} ") == len(blocks)
    assert comparison.filled(text, shipped(name), name) == text


def test_records_stay_small():
    """A clone is what a workshop begins with, and its network is the room's."""
    sizes = {path.name: path.stat().st_size for path in RECORDED.parent.glob("*.json")}
    assert RECORDED.name in sizes
    assert not {name: size for name, size in sizes.items() if size >= 3_000_000}


def test_a_file_of_marks_is_written_and_the_rest_of_it_kept(tmp_path, capsys):
    kept = record(sft=[((0, 0), 1)] * 2, grpo=[((1, 0), 1)] * 2)
    source, target = tmp_path / "world.json", tmp_path / "README.md"
    source.write_text(recorded.as_json(kept))
    assert read_json(source) == kept
    target.write_text("before\n<!-- world arms -->\nold\n<!-- end -->\nafter\n")
    assert comparison.main([str(source), "--write", str(target)]) == 0
    text = target.read_text()
    assert text.startswith("before\n<!-- world arms -->\n| % | seeds |") and "old" not in text
    assert text.endswith("<!-- end -->\nafter\n")
    assert comparison.main([str(source)]) == 0
    assert "| grpo | 2 |" in capsys.readouterr().out
    target.write_text("<!-- world arms -->\nold\n")
    assert comparison.main([str(source), "--write", str(target)]) == 2
    assert "no <!-- end --> after it" in capsys.readouterr().err
    source.write_text(json.dumps({"rows": []}))
    assert comparison.main([str(source)]) == 2
    assert "not a record" in capsys.readouterr().err


def test_figures_of_a_record(tmp_path):
    assert comparison.main([str(RECORDED), "--figures", str(tmp_path / "new")]) == 0
    made = {p.name for p in (tmp_path / "new" / "figures").iterdir()}
    assert made == {"pocket_front.png"}


@pytest.fixture(scope="module")
def retention():
    """The record, and its figures."""
    kept = shipped("retention")
    return kept, studyplots.drawn(kept)


def test_tables_have_every_arm_of_their_regime(retention, monkeypatch):
    kept = retention[0]
    drawn = effects.draws  # what follows looks at no interval
    monkeypatch.setattr(effects, "draws", lambda runs, count=9: drawn(runs, min(count, 9)))
    arms = effects.by_arm(kept)
    for regime in ("sft", "grpo"):
        lines = comparison.tax(kept, regime).splitlines()
        assert len({line.count("|") for line in lines}) == 1
        shown = {line.split("|")[1].strip() for line in lines[2:]}
        wanted = {a for a in arms if a.startswith("alone") == (regime == "grpo")} | {"base"}
        assert shown == wanted


@pytest.mark.parametrize("name", ["front", "tax"])
def test_a_figure_names_each_arm_once_and_apart(retention, name):
    kept, figure = retention[0], retention[1][name]
    (axis,), names = figure.axes, {}
    for text in axis.texts:
        if text.get_text():
            names[text.get_text().partition(" (")[0]] = text
    seeds = {arm: len(runs) for arm, runs in effects.by_arm(kept).items()}
    assert set(names) == {arm for arm, count in seeds.items() if count == 3} < set(seeds)
    figure.draw_without_rendering()
    boxes = (Text.get_window_extent(text) for text in names.values())  # without their lines
    assert all(a.y1 <= b.y0 for a, b in itertools.pairwise(sorted(boxes, key=lambda box: box.y0)))
    (green,) = axis.patches
    inside = {arm for arm, text in names.items() if green.get_bbox().contains(*text.xy)}
    assert "penalty_weight_1" in inside and not inside & {"sft", "cone", "alone"}
    assert ("replay_half" in inside) == (name == "front")  # what is lost elsewhere
