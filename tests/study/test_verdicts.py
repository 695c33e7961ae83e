"""Verdicts of the decisive study, against scipy, statsmodels and studies whose truth is known."""

import numpy as np
import pytest
from scipy.stats import ttest_rel
from statsmodels.stats.weightstats import ttost_paired

from bbkit.study import arms, recorded, simulation, verdicts
from bbkit.study.verdicts import FAMILIES, UNTAXED, judged, paired, untaxed

KINDS = ("chat", "facts")


def study(seeds=12, shift=None, noise=0.02, lost=0.0):
    """A record of every arm that is contrasted: answers of 50 questions and 50 instructions."""
    rng, runs = np.random.default_rng(0), {}
    names = {a for f in FAMILIES.values() for c in f for a in (c.before, c.after)}
    names |= {arm for some in UNTAXED for arm in some}
    items = [[f"q{i}", "choice", f"d{i}", "s"] for i in range(50)]
    items += [[f"i{i}", "instruction", f"e{i}", "s"] for i in range(50)]
    items += [[k, "elsewhere", k, k] for k in KINDS]
    for arm in sorted(names - {"base"}):
        for seed in range(seeds):
            share = 0.8 + (shift or {}).get(arm, 0.0) + rng.normal(0, noise)
            right = [int(i < 100 * share / 2) for i in range(50)]
            empty = [None] * 50
            scores = {
                "domain_lenient": [*right, *empty], "domain": [*right, *empty],
                "instruction_unseen": [*empty, *[int(i < 40) for i in range(50)]],
                "kl": (0.05 * rng.random(102)).tolist(), "elsewhere": [[lost, lost]] * len(KINDS),
            }  # fmt: skip
            stage = "sft" if arm == "sft" else "grpo"
            runs[f"{arm}-{seed}"] = {"from": None, "scores": {stage: scores}}
            if arm == "sft":
                base = {**scores, "elsewhere": [[0.0, 0.0]] * len(KINDS)}
                base["domain_lenient"] = base["domain"] = [
                    *[int(i < 40) for i in range(50)],
                    *empty,
                ]
                runs[f"sft-{seed}"]["scores"]["base"] = base
    return {"items": items, "runs": runs}


def said(kept, family="the whole method"):
    found = verdicts.effects.by_arm(kept)
    return {c.asks: told for c, _, _, told in judged(found, family)}


def test_contrasts_are_shown_by_the_answer_tag_too():
    """A tag that says another answer than the gold one beside it was right when read leniently."""
    kept = study(seeds=3)
    for name, run in kept["runs"].items():
        for columns in run["scores"].values():
            columns["format"] = [1] * 50 + [None] * 50
            if name.startswith("full-"):
                columns["domain"] = [0] * 50 + [None] * 50
    row = next(
        x for x in verdicts.table(kept, "the whole method").splitlines() if "full − grpo |" in x
    )
    assert row.split("|")[-2].strip().startswith("-6")
    assert not row.split("|")[3].strip().startswith("-6")


def test_the_tests_are_scipys_and_statsmodels():
    one, other = np.random.default_rng(1).normal(0.5, 0.1, (2, 9))
    found = paired((one - other).tolist(), 0.05)
    theirs = ttest_rel(one, other)
    assert found["p"] == pytest.approx(theirs.pvalue)
    assert found["interval"] == pytest.approx([*theirs.confidence_interval()])
    assert found["p_none"] == pytest.approx(ttost_paired(one, other, -0.05, 0.05)[0])
    with pytest.raises(ValueError, match="needs two"):
        paired([0.1])


def test_each_of_the_four_verdicts_comes_where_it_is_true():
    shift = {"full": 0.15, "grpo": 0.0, "gdpo": 0.3, "dynamic": 0.15, "orthogonal": 0.15}
    told = said(study(shift=shift, noise=0.01))
    assert told["the full method against plain GRPO"] == "better"
    assert told["the full method against GDPO"] == "worse"
    assert told["orthogonal gradients"] == "no difference of 3 points"
    told = said(study(shift=shift, noise=0.08, seeds=3))
    assert told["orthogonal gradients"].startswith("undecided; takes about ")


def test_a_floor_is_no_equivalence():
    shift = dict.fromkeys(("conflict", "conflict_orthogonal"), -1.0)
    told = said(study(shift=shift), "rewards that conflict")
    assert told["orthogonal gradients"] == "none to see: both are 0"
    assert told["orthogonal steps"] == "better"


def test_what_has_not_run_is_said_and_counts():
    kept = study(shift={"full": 0.05}, noise=0.025, seeds=6)
    p = {c.after + c.before: p for c, _, p, _ in judged(verdicts.effects.by_arm(kept), FULL)}
    runs = {k: v for k, v in kept["runs"].items() if k.rpartition("-")[0] in ("full", "grpo")}
    less = judged(verdicts.effects.by_arm({**kept, "runs": runs}), FULL)
    told = {c.after + c.before: (q, said) for c, _, q, said in less}
    assert [said for _, said in told.values()].count("not run") == len(told) - 1
    raw = paired(verdicts.differences(verdicts.effects.by_arm(kept), "grpo", "full", "area"))["p"]
    assert told["fullgrpo"][0] == pytest.approx(min(1.0, raw * len(told))) and p["fullgrpo"] > raw


FULL = "the whole method"


@pytest.mark.parametrize(("lost", "verdict"), [(0.0, "no tax"), (0.2, "taxed")])
def test_no_tax_needs_both_to_hold(lost, verdict):
    lines = untaxed(study(lost=lost)).splitlines()[2:]
    assert len(lines) == sum(map(len, UNTAXED))
    assert all(line.endswith(f"| {verdict} |") for line in lines)


def test_every_arm_that_is_contrasted_is_run_and_on_enough_seeds():
    run = {a: n for names, n in arms.DECISIVE for a in arms.needed(names.split(","))}
    first = {a: max(n for names, n in arms.DECISIVE if a in arms.needed(names.split(",")))
             for a in run}  # fmt: skip
    assert set(run) <= set(arms.ARMS)
    for family, least in zip(FAMILIES, (20, 8, 12, 6, 6, 12), strict=True):
        for contrast in FAMILIES[family]:
            for arm in {contrast.before, contrast.after} - {"base", "sft"}:
                assert first[arm] >= (6 if arm == "orthogonal" else least), arm


def test_the_front_page_has_a_line_of_each_contrast_that_the_title_asks():
    kept = study()
    page = verdicts.page(kept)
    lines = [line.split(" | ") for line in verdicts.title(kept).splitlines()[2:]]
    assert len(lines) == len(verdicts.TITLE) == 8
    assert {line[0].strip("| ") for line in lines} < {*FAMILIES}  # one had no room to differ
    for family, *rest in lines:  # as the page of all has it
        assert " | ".join(rest) in page, family


def test_a_brief_record_says_the_same_of_each_seed():
    kept = study(seeds=3, lost=0.05)
    kept["items"] += [["chat-2", "elsewhere", "chat", "chat"]]  # kinds of different sizes
    for run in kept["runs"].values():
        for columns in run["scores"].values():
            columns["elsewhere"] = [*columns["elsewhere"], [0.25, 0.5]]
    own = kept["runs"]["step-1"]["scores"]  # an arm with an SFT of its own
    own["sft"], own["base"] = own.pop("grpo"), kept["runs"]["sft-1"]["scores"]["base"]
    brief = recorded.brief(kept)
    assert (
        len(brief["items"]) == 100 + len(KINDS) and "base" not in brief["runs"]["step-1"]["scores"]
    )
    one, other = verdicts.effects.by_arm(kept), verdicts.effects.by_arm(brief)
    for arm in (*one, "base"):
        for seed, known in verdicts.values(one, arm).items():
            assert verdicts.values(other, arm)[seed] == pytest.approx(known, abs=1e-4)
    assert recorded.unpack(brief, "step-1")["base"][0]["scores"]["domain"] == 1
    assert recorded.brief(brief) == brief


def test_intervals_that_are_too_short_are_seen(monkeypatch):
    """At three seeds the normal distribution's interval covers in 81 % of studies."""
    spread = [0.002, 0.02, 0.1]
    shares = simulation.coverage(3, 40, spread, 200)
    assert 0.92 < shares[1] < 0.98
    student = verdicts.paired

    def normal(some, *how):
        found = student(some, *how)
        half = 1.96 * found["spread"] / len(some) ** 0.5
        return found | {"interval": [found["value"] - half, found["value"] + half]}

    monkeypatch.setattr(verdicts, "paired", normal)
    assert simulation.coverage(3, 40, spread, 200)[1] < 0.88


def test_the_command_says_both_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(simulation, "SEEDS", (3, 6))
    for name, count in {"coverage": 3, "wrong": 20, "wrongly_untaxed": 20, "decided": 20}.items():
        real = getattr(simulation, name)
        monkeypatch.setattr(simulation, name, lambda *a, r=real, n=count: r(*a, count=n))
    file = tmp_path / "record.json"
    file.write_text(recorded.as_json(study(seeds=4)))
    assert simulation.main([str(file)]) == 0
    out = capsys.readouterr().out
    assert "covers, %" in out and "| no tax |" in out and "| the whole method | 8 |" in out
    file.write_text('{"items": [], "runs": {}}')
    assert simulation.main([str(file)]) == 2 and "no run sft-SEED" in capsys.readouterr().err
