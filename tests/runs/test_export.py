"""Leaving with a model: what is written, that it is the trained one, and what is refused."""

import json
import shutil

import pytest
import yaml
from conftest import moved

from bbkit import config, models
from bbkit.runs import export, record


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a random adapter, as training leaves one."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = config.load("pocket")
    model, _ = models.load(settings.model, say=lambda line: None)
    model = moved(models.add_lora(model, settings.model, 0))
    command = ["python", "-m", "bbkit.train"]
    with record.Run(folder, config.to_dict(settings), command) as opened:
        models.save_adapter(model, folder / "adapter")
        share = {"value": 0.5, "n": 40, "interval": [0.35, 0.65]}
        opened.evaluation({"base": {"domain": share}})
        opened.evaluation({"grpo": {"domain": share | {"value": 0.6}}})
        opened.done("grpo", seconds=60.0)
    return folder


def test_the_merged_model_is_the_tuned_one_in_plain_transformers(run, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert export.main([str(run), "--out", str(out)]) == 0
    assert "differ by at most" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    base, _ = models.load(config.load("pocket").model, say=lambda line: None)
    ids = tokenizer("fever is a symptom of", return_tensors="pt")["input_ids"]
    untuned = base(input_ids=ids).logits
    tuned = models.load_adapter(base, out / "adapter")(input_ids=ids).logits
    merged = plain(input_ids=ids).logits
    assert (merged - tuned).abs().max() < 1e-4
    assert (merged - untuned).abs().max() > 1e-2
    assert tokenizer.chat_template
    assert [p.name for p in (out / "model").glob("*.safetensors")] == ["model.safetensors"]
    assert not list((out / "model").glob("*.bin"))


def test_the_card_says_what_must_be_known(run, tmp_path):
    out = tmp_path / "out"
    assert export.main([str(run), "--out", str(out), "--dtype", "bfloat16"]) == 0
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front
    for said in ("Not for clinical use", "50.0 [35.0, 65.0]", "cc0-1.0", "disease-ontology.org",
                 "python -m bbkit.train", "bfloat16", "Limits"):  # fmt: skip
        assert said in text, said


def test_nothing_is_overwritten_or_left_half_done(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    assert export.main([str(run), "--out", str(out)]) == 2
    assert export.main([str(run), "--out", str(out / "mine")]) == 2
    said = capsys.readouterr().err
    assert said.count("not an empty folder") == 2 and (out / "mine").read_text() == "x"
    monkeypatch.setattr(models, "merge", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        export.main([str(run), "--out", str(tmp_path / "other")])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "run.json").unlink(), "run.json: cannot be read"),
        (lambda run: (run / "run.json").write_text("[]"), "not the manifest of a run"),
        (lambda run: (run / "adapter" / models.ADAPTER).unlink(), "no adapter here"),
    ],
)
def test_a_broken_run_is_one_line(run, tmp_path, capsys, spoil, said):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    spoil(copy)
    assert export.main([str(copy)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (copy / "export").exists()


def test_a_hub_model_is_named_as_the_base(run):
    manifest = json.loads((run / "run.json").read_text())
    manifest["settings"]["model"]["name"] = "Qwen/Qwen2.5-0.5B-Instruct"
    text = export.card(manifest, {}, "float32", 0.0)
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
