"""Arms against each other: intervals over seeds and prompts, the rule of the verdicts, tables."""

import json
from pathlib import Path

import numpy as np
import pytest

from bbkit.machine.files import read_json
from bbkit.runs import statistics
from bbkit.study import arms, comparison, effects, ledger, recorded, studyplots

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "notebooks" / "recorded" / "pocket.json"


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
    change, seeds = effects.change(effects.arms(kept), "grpo", "full")
    assert seeds == 2 and change["domain"][0] == 0.75
    assert effects.change(effects.arms(kept), "grpo", "gdpo") == ({}, 0)
    change, seeds = effects.change(effects.arms(kept), "base", "full")
    assert seeds == 2 and change["domain"][0] == 1.0


@pytest.mark.parametrize(
    ("low", "high", "sign", "said"),
    [
        (0.01, 0.05, 1, "reproduced"),
        (0.01, 0.05, -1, "not reproduced"),
        (-0.05, -0.01, -1, "reproduced"),
        (-0.019, 0.019, 1, "not reproduced"),  # nothing that matters
        (-0.01, 0.05, 1, "inconclusive"),
    ],
)
def test_the_rule(low, high, sign, said):
    seen = {"value": (low + high) / 2, "interval": [low, high]}
    assert ledger.verdict(seen, sign) == said
    assert ledger.verdict(None, sign) == "not attempted"
    ratio = {"value": 1, "interval": [np.exp(low), np.exp(high)]}
    assert ledger.verdict(ratio, sign, 1.0) == (
        "not reproduced" if said == "inconclusive" else said  # e^0.05 is within 0.9 to 1.1
    )


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.01, 0.5, "reproduced"), (-0.5, -0.03, "not reproduced"), (-0.03, 0, "inconclusive")],
)
def test_the_rule_of_what_costs_nothing(low, high, said):
    assert ledger.verdict({"value": 0, "interval": [low, high]}, 0) == said


def test_forgetting_less_by_learning_less_is_no_success():
    def said(full):
        kept = record(sft=[((0, 0), 0)], dynamic=[((1, 1), 0)], full=[full])
        lines = ledger.claims(kept).splitlines()
        return next(line for line in lines if "orthogonality with" in line).split(" | ")[-1]

    assert said(((1, 1), 1)) == "reproduced |"
    assert said(((0, 0), 1)) == "inconclusive |"


def test_equal_kl_takes_off_what_goes_with_the_distance():
    kept = record(sft=[((0, 0), 0.5)], grpo=[((1, 1), 0.5)])
    for name, kl, general in (("sft-0", 0.4, 0.6), ("grpo-0", 0.1, 0.9)):  # 1 point for 0.01 nats
        stage = name[:-2]
        kept["runs"][name]["scores"][stage] |= {"kl": [kl] * 3}
        kept["runs"][name]["scores"][stage]["instruction_unseen"][2] = general
    assert effects.slope(effects.arms(kept)) == pytest.approx(-1.0)
    head, _, line = (row.split(" | ") for row in comparison.changes(kept, "sft").splitlines())
    told = dict(zip(head, line, strict=True))
    assert told["general"].strip("*").startswith("+30.0")
    assert told["general, at equal KL |"] == "+0.0 [+0.0, +0.0] |"


def test_each_data_set_is_told_apart_and_claims_without_arms_can_be_left_out():
    kept = record(sft=[((0, 0), 0)], grpo=[((1, 0), 1)])
    assert comparison.sources(kept) == ""  # one data set: nothing to tell apart
    kept["items"][1][3] = "other"
    lines = comparison.sources(kept).splitlines()
    assert lines[0] == "| % | other | s |"
    assert [cell.split()[0] for cell in lines[-1].split(" | ")[1:]] == ["0.0", "100.0"]
    shorter, whole = ledger.attempted(kept), ledger.claims(kept)
    assert "not attempted" in whole and "not attempted" not in shorter
    assert set(shorter.splitlines()) < set(whole.splitlines()) and "grpo − sft" in shorter
    told = comparison.told(kept)  # what a study of two arms prints
    assert shorter in told and "not attempted" not in told and "| hypothesis |" not in told
    first = ledger.main_claims(kept).splitlines()
    assert set(first) < set(whole.splitlines()) and len(first) == 2 + len(ledger.MAIN)


def test_seeds_after_the_rule_are_judged_by_themselves():
    low, high = ((0, 0), 0), ((1, 1), 1)
    kept = record(sft=[low] * 5, grpo=[low] * 3 + [high] * 2)  # seeds 3 and 4 alone gained

    def said(block):
        line = next(row for row in block(kept).splitlines() if "gives it back" in row)
        return line.split(" | ")[3:]

    assert said(ledger.main_claims) == ["5", "inconclusive |"]
    assert said(comparison.BLOCKS["later"]) == ["2", "reproduced |"]


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
    assert ledger.ratio_cell(found) == "1.00 [0.61, 1.63]"  # half of the log interval: log 2/√2
    assert found["n"] == 2
    by_entropy = effects.noise_by_entropy(kept, "full")
    assert by_entropy["value"] == pytest.approx(0.5) and by_entropy["n"] == 2
    runs["sft-0"]["noise"] = runs["sft-1"]["noise"] = None
    assert effects.noise_ratio(kept, "full") is None
    assert effects.noise_by_entropy(kept, "full") is None


STUDIES = (
    "pocket arms", "pocket changes", "pocket claims", "pocket hypotheses", "pocket later",
    "smollm2 arms", "smollm2 attempted", "smollm2 changes", "smollm2 sources",
    "decisive SFT", "decisive scores of SFT", "decisive steps",
    "decisive rewards that conflict", "decisive scores of rewards that conflict",
)  # fmt: skip


@pytest.mark.parametrize(
    ("page", "blocks"),
    [(ROOT / "README.md", ("pocket main",)), (RECORDED.parent / "README.md", STUDIES)],
    ids=["front", "recorded"],
)
def test_pages_say_what_the_records_say(page, blocks):
    """Stale? python -m bbkit.study.comparison notebooks/recorded/pocket.json --write PAGE"""
    text = page.read_text(encoding="utf-8")
    for block in blocks:
        assert text.count(f"<!-- {block} -->\n") == 1, block
    for path in (RECORDED.with_name(f"{name}.json") for name in ("pocket", "smollm2", "decisive")):
        assert comparison.filled(text, recorded.read(path), path.stem) == text


def test_a_file_of_marks_is_written_and_the_rest_of_it_kept(tmp_path, capsys):
    kept = record(sft=[((0, 0), 1)] * 2, grpo=[((1, 0), 1)] * 2)
    source, target = tmp_path / "world.json", tmp_path / "README.md"
    source.write_text(recorded.text(kept))
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


def test_no_two_arms_look_alike_and_the_rest_are_said_to_be_others():
    kinds = [*studyplots.STYLES.values(), studyplots.OTHER]
    assert len({(kind["color"], kind["marker"]) for kind in kinds}) == len(kinds)
    there = effects.arms(recorded.read(RECORDED))  # arms of a study that is over are in its record
    assert set(studyplots.STYLES) - {"base"} <= {*arms.ARMS, *there}
    half, none, all_ = ((0.5, 0.5), 1), ((0, 0), 1), ((1, 1), 1)
    kept = record(sft=[none], grpo=[half], random=[all_], judged=[none])
    left, right = studyplots.front(kept).axes
    assert left.get_legend_handles_labels()[1] == ["base", "sft", "grpo", "the others"]
    named = [label.get_text() for label in right.get_yticklabels()]
    assert named == ["sft (1)", "random (1)", "judged (1)"]
    assert "clear of 0 are 1 above and 2 below" in studyplots.front(kept).get_supxlabel()


def test_figures_of_a_record(tmp_path):
    assert comparison.main([str(RECORDED), "--figures", str(tmp_path / "new")]) == 0
    made = {p.name for p in (tmp_path / "new" / "figures").iterdir()}
    assert made == {"pocket_front.png"}
    bare = record(sft=[((0, 0), 1)], grpo=[((1, 0), 1)])
    figure = studyplots.front(bare)
    assert {line.get_label() for line in figure.axes[0].lines} >= {"base", "sft", "grpo"}


def test_the_page_of_both_regimes_shows_its_record(monkeypatch):
    """Stale? The last commands of notebooks/recorded/README.md make it again."""
    page = (RECORDED.parent / "README.md").read_text(encoding="utf-8")
    kept = recorded.read(RECORDED.parent / "retention.json")
    assert comparison.filled(page, kept, "retention") == page
    real = recorded.read(RECORDED.parent / "retention_smollm2.json")
    assert comparison.filled(page, real, "retention_smollm2") == page
    assert "<!-- retention_smollm2 tax sft -->" in page
    drawn = effects.draws  # what follows looks at no interval
    monkeypatch.setattr(effects, "draws", lambda runs, count=9: drawn(runs, min(count, 9)))
    arms = effects.arms(kept)
    for regime in ("sft", "grpo"):
        lines = comparison.tax(kept, regime).splitlines()
        assert len({line.count("|") for line in lines}) == 1
        shown = {line.split("|")[1].strip() for line in lines[2:]}
        wanted = {a for a in arms if a.startswith("alone") == (regime == "grpo")} | {"base"}
        assert shown == wanted
    left = studyplots.tax_front(kept).axes[0]
    marks = {line.get_label() for line in left.get_lines() if line.get_label()[0] != "_"}
    whole = {arm for arm, seeds in arms.items() if len(seeds) == 3 and arm[:5] != "alone"}
    assert marks == whole | {"base", "arms of few seeds"}
    shown = {line.get_label(): line.get_markerfacecolor() for line in left.get_lines()}
    assert shown["sft"] == "white" != shown["penalty_weight_1"]  # what is lost elsewhere
