"""The benchmark's figures are of the right things; how large they are is not tested."""

import json

import pytest

from bbkit import benchmark

SMALL = "--capabilities 2 --rank 4 --sequences 2 --tokens 17 --rounds 1".split()


def test_it_measures_every_variant_and_writes_json(tmp_path, capsys, monkeypatch):
    apart = benchmark._peak_elsewhere  # a process each: one of them is enough here
    monkeypatch.setattr(
        benchmark, "_peak_elsewhere", lambda *a: apart(*a) if a[-1] == "one_pass" else 2e8
    )
    out = tmp_path / "figures.json"
    assert benchmark.main([*SMALL, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    rows = {row["variant"]: row for row in found["rows"]}
    assert set(rows) == set(benchmark.VARIANTS) and "machine" in found
    for key in ("backward", "both", "step", "step_with_generation"):
        assert rows["plain"][key] == 1.0 and rows["one_pass"][key] > 0
    assert all(row["peak_bytes"] > 1e7 for row in rows.values())
    table = capsys.readouterr().out
    assert all(f"| {variant} |" in table for variant in benchmark.VARIANTS)


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["--preset", "pocked"], 2),
        (["--set", "model.name=./nowhere"], 2),
        (["--sequences", "3"], 2),
    ],
)
def test_bad_input_is_one_line(arguments, code, capsys):
    assert benchmark.main([*SMALL, *arguments]) == code
    assert capsys.readouterr().err.startswith("error: ")
