"""Results of several runs as one table."""

import json

import pytest

from bbkit import InputError
from bbkit.config import load, to_dict
from bbkit.runs import report
from bbkit.runs.record import Run

DISEASES = [f"d{i}" for i in range(20)]


def run(folder, seed, right, **changed):
    """A run whose SFT answers the first `right` of 20 questions and whose base answers none."""
    settings = to_dict(load("pocket", overrides=[f"run.seed={seed}"]))
    settings["sft"] |= changed
    with Run(folder, settings, ["python", "-m", "bbkit.train"]):
        (folder / "evaluation").mkdir()
        for stage, good in (("base", 0), ("sft", right)):
            rows = [
                {"id": d, "task": "choice", "entity": d, "source": "ontology"}
                | {"scores": {"domain": float(i < good)}}
                for i, d in enumerate(DISEASES)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "evaluation" / f"{stage}.jsonl").write_text(text)
    return folder


def test_seeds_are_pooled_and_diseases_stay_the_clusters(tmp_path):
    runs = [run(tmp_path / "a", 0, 10), run(tmp_path / "b", 1, 10)]
    one, two = report.pooled(runs[:1]), report.pooled(runs)
    assert two["sft"]["domain"]["value"] == one["sft"]["domain"]["value"] == 0.5
    assert two["sft"]["domain"]["n"] == 40
    # The same diseases twice are no more diseases: the interval must not shrink.
    assert two["difference"] == {
        "sft-base": {"domain": one["difference"]["sft-base"]["domain"] | {"n": 40}}
    }
    other = report.pooled([runs[0], run(tmp_path / "c", 2, 20)])
    assert other["difference"]["sft-base"]["domain"]["value"] == 0.75


def test_command_prints_one_table_or_says_what_does_not_fit(tmp_path, capsys):
    runs = [run(tmp_path / "a", 0, 10), run(tmp_path / "b", 1, 12)]
    assert report.main(list(map(str, runs))) == 0
    out = capsys.readouterr().out
    assert "| domain accuracy | 40 | 0.0 [0.0, 0.0] | 55.0 [" in out
    assert all((folder / "report.md").exists() for folder in runs)
    assert report.main([str(runs[0])]) == 0
    assert capsys.readouterr().out == f"{runs[0] / 'report.md'}\n"
    changed = run(tmp_path / "c", 2, 5, steps=7)
    assert report.main([str(runs[0]), str(changed)]) == 2
    assert "sft.steps differs from" in capsys.readouterr().err
    (changed / "run.json").write_text('{"settings": {}}')
    assert report.main([str(runs[0]), str(changed)]) == 2
    assert "not the manifest of a run" in capsys.readouterr().err
    (runs[1] / "metrics.jsonl").write_text(
        json.dumps({"stage": "grpo", "step": 1, "reward/domain": 10**400}) + "\n"
    )
    assert report.main([str(runs[1])]) == 2
    assert "not those of a run" in capsys.readouterr().err
    assert report.main([str(tmp_path / "none")]) == 2
    with pytest.raises(InputError, match=r"no run\.json"):
        report.pooled([tmp_path / "none"])
