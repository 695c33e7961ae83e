"""Loss and KL to the base on text that nothing trains on, and the prompts that stay apart of it."""

import json
import re
import shutil

import pytest
import torch
from conftest import TINY as SHORT

from bbkit import InputError, config, data, evaluate, models, prompts, train
from bbkit.data import corpus, instructions, knowledge
from bbkit.machine import generation
from bbkit.machine.files import read_json, read_rows
from bbkit.runs import elsewhere, report
from bbkit.study import comparison, effects, recorded

POCKET = config.load("pocket", overrides=["evaluation.elsewhere=6"])
TEXTS = elsewhere.texts(POCKET)
OPEN = config.load("smollm2-cpu", overrides=["evaluation.elsewhere=5"])
FILES = {
    "answers": "general/dolly_hhrlhf_train_small.jsonl",
    "writing": "general/user_oriented_instructions.jsonl",
    "ifeval": "ifeval/input_response_data_gpt4_20231107_145030.jsonl",
    "edits": "general/instruction-data.json",
}
TINY = [*SHORT, "--set=grpo.steps=1", "--set=evaluation.elsewhere=5", "--set=retention.rule=none"]


@pytest.fixture(scope="module")
def tuned():
    """The pocket model with an adapter that changes nothing yet, in training mode."""
    model, tokenizer = models.load(POCKET.model)
    return models.add_lora(model, POCKET.model, 0).train(), tokenizer


@pytest.fixture
def moved(tuned):
    """The same with an adapter that changes much."""
    model, tokenizer = tuned
    torch.manual_seed(0)
    weights = [w for name, w in model.named_parameters() if "lora_B" in name]
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.05)
    yield model, tokenizer
    for weight in weights:
        torch.nn.init.zeros_(weight)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a tiny run with both stages."""
    out = tmp_path_factory.mktemp("elsewhere") / "sft-0"
    assert train.main(["--preset", "pocket", "--out", str(out), *TINY]) == 0
    return out


# ---- the prompts for retention


def test_prompts_are_distinct_and_of_four_kinds_in_equal_shares():
    rows = data.load("pocket_prompts", "train")
    kinds = [e.entity for e in rows]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(corpus.KINDS, 512)
    assert len({(e.system, e.question) for e in rows}) == len({e.id for e in rows}) == 2048
    for e in rows:
        assert e.task == "instruction" and e.answer and not e.constraints
        assert prompts.messages(e)[-1] == {"role": "user", "content": e.question}
        assert (prompts.messages(e)[0]["content"] == e.system) == bool(e.system)
    for kind in corpus.KINDS:  # one in five asks for tags, three in ten say something else
        systems = [e.system for e in rows if e.entity == kind]
        wraps = [s for s in systems if s and s not in corpus.SYSTEMS]
        assert 0.15 < len(wraps) / 512 < 0.3 and 0.42 < sum(map(bool, systems)) / 512 < 0.58
    assert all(
        e.answer.startswith("<") and e.answer.endswith(">")
        for e in rows if e.system and e.system not in corpus.SYSTEMS
    )  # fmt: skip
    assert rows == data.load("pocket_prompts", "train")
    assert rows != data.load("pocket_prompts", "train", seed=1)


def test_prompts_know_nothing_of_the_other_splits():
    rows = data.load("pocket_prompts", "train", seed=3)
    words = re.compile(r"\w+")  # names as words in a row, whatever stands between
    text = " ".join(words.findall(" ".join(f"{e.question} {e.answer}" for e in rows).casefold()))
    causes = knowledge.index()
    for split in ("validation", "test"):
        with pytest.raises(InputError, match=r"did you mean|no split"):
            data.load("pocket_prompts", split)
        for disease in knowledge.diseases(split):
            for name in (disease, *causes[disease].get("cause", ())):
                assert f" {' '.join(words.findall(name.casefold()))} " not in f" {text} ", name
    asked = [e for e in rows if e.entity == "instruction" and "tag" not in e.question]
    assert asked and all(instructions.split_of(e) == "train" for e in asked)


def test_documents_of_one_form_leave_the_recipe_as_it_was():
    """The shipped weights' corpus: a hash of what the generator drew before `turns` was cut out."""
    import hashlib

    found = hashlib.sha256()
    for seed in (0, 1, 2):
        for progress in (0.3, 0.6, 1.0):
            found.update(repr(list(corpus.documents(seed, 2000, progress))).encode())
    assert found.hexdigest() == "971881f5e6bcc72bd7f83730dd36f031f917f9106793cc50476e8fd15f0985cd"
    assert {form for form, *_ in corpus.turns(0, 50, shares=(0, 0, 0, 1, 0))} == {"echo"}


# ---- the texts


def test_texts_of_pocket_are_those_asked_for_and_no_prompts_of_retention():
    many = elsewhere.texts(config.load("pocket"))
    kinds = [e.entity for e in many]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(corpus.FORMS, 150)
    assert many == elsewhere.texts(config.load("pocket", overrides=["run.seed=5"]))
    assert elsewhere.texts(config.load("pocket", overrides=["evaluation.elsewhere=0"])) == []
    for seed in range(3):
        trained = {e.question for e in data.load("pocket_prompts", "train", seed=seed)}
        assert not trained & {e.question for e in many}
    held_out = {*knowledge.diseases("test"), *knowledge.diseases("validation")}
    facts = [e.answer for e in many if e.entity == "facts"]
    assert not any(e.question for e in many if e.entity == "facts")
    assert any(name in text for name in held_out for text in facts)
    chains = [f". {knowledge.state(fact)}" for fact in knowledge.facts()]
    assert not any(chain in f". {text}" for chain in chains for text in facts)


def test_texts_for_other_models_are_read_from_the_folder(data_dir, tmp_path, capsys):
    missing = [file for file in FILES.values() if not (data_dir / file).is_file()]
    if missing:
        pytest.skip(f"{missing} not in {data_dir}")
    rows = elsewhere.texts(OPEN, data_dir)
    assert [e.entity for e in rows] == [kind for kind in FILES for _ in range(5)]
    assert rows == elsewhere.texts(OPEN, data_dir) and capsys.readouterr().out == ""
    assert all(e.answer.strip() and e.question.strip() for e in rows)
    assert not any("### Instruction" in e.question for e in rows)
    assert all("\n\n" in e.question for e in rows if e.entity == "edits")
    for file in (FILES["answers"], FILES["edits"]):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(data_dir / file, tmp_path / file)
    assert {e.entity for e in elsewhere.texts(OPEN, tmp_path)} == {"answers", "edits"}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"not in {tmp_path}" in said
    assert "not measured on writing (general_instructions), ifeval (open_replies)" in said
    (tmp_path / FILES["answers"]).write_text("{}")  # there, but not as the card says
    with pytest.raises(InputError, match="dolly_hhrlhf"):
        elsewhere.texts(OPEN, tmp_path)


def test_without_folder_and_hub_nothing_is_measured_and_that_is_said(monkeypatch, capsys):
    def away(*_, **__):
        raise elsewhere.CannotRun("no route")

    monkeypatch.setattr(data, "load", away)
    assert elsewhere.texts(OPEN) == []
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and all(kind in said for kind in FILES) and "--data-dir" in said


# ---- the measure


def test_a_new_adapter_changes_nothing(tuned):
    model, tokenizer = tuned
    found = elsewhere.measured(model, tokenizer, TEXTS, 256)
    assert model.training and len(found) == len(TEXTS) == 30
    assert all(value == 0.0 for row in found for value in row["scores"].values())
    base, _ = models.load(POCKET.model)  # before there is an adapter: the same rows
    assert elsewhere.measured(base, tokenizer, TEXTS, 256) == found


def plainly(model, tokenizer, e, max_length=256):
    """Loss and KL of one text from plain forward passes over its whole template."""
    text = e.answer + tokenizer.eos_token
    if e.question:
        turns = [{"role": "user", "content": e.question}, {"role": "assistant", "content": ""}]
        if e.system:
            turns = [{"role": "system", "content": e.system}, *turns]
        asked = tokenizer.apply_chat_template(turns, tokenize=False)
        asked = asked.removesuffix("<|end|>")
        first = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        text = asked + text
    else:
        first = 1
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:max_length]])
    model.eval()
    with torch.no_grad():
        ours = model(ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < first, -100))
        with model.disable_adapter():
            bases = model(ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < first, -100))
    p, q = (x.logits[0, first - 1 : -1].softmax(-1) for x in (bases, ours))
    return (ours.loss - bases.loss).item(), (p * (p / q).log()).sum(-1).mean().item()


def test_loss_and_kl_are_those_of_plain_forward_passes(moved):
    model, tokenizer = moved
    model.train()
    found = elsewhere.measured(model, tokenizer, TEXTS, 256)
    assert model.training
    for e, row in zip(TEXTS, found, strict=True):
        above, kl = plainly(model, tokenizer, e)
        assert row["scores"][f"elsewhere_{e.entity}"] == pytest.approx(above, rel=1e-4, abs=1e-5)
        assert row["scores"][f"elsewhere_kl_{e.entity}"] == pytest.approx(kl, rel=1e-4, abs=1e-5)
        assert row["scores"][f"elsewhere_kl_{e.entity}"] > 0 and len(row["scores"]) == 2
        assert (row["question"], row["reply"]) == (e.question, e.answer)
        assert (row["task"], row["source"]) == ("elsewhere", f"elsewhere {e.entity}")
    assert max(abs(v) for r in found for k, v in r["scores"].items() if "kl" not in k) > 0.01


def test_texts_are_cut_with_their_prompts(moved):
    model, tokenizer = moved
    longest = max(TEXTS, key=lambda e: len(e.answer))
    _, asked = elsewhere._encode(tokenizer, longest, 10**6)
    (row,) = elsewhere.measured(model, tokenizer, [longest], asked + 2)
    above, kl = plainly(model, tokenizer, longest, asked + 2)
    assert list(row["scores"].values()) == pytest.approx([above, kl], rel=1e-3)
    assert elsewhere.measured(model, tokenizer, [longest], asked) == []


# ---- in results


def rows(values):
    """Item rows: one question, one instruction, and texts of kinds as {kind: [loss, …]}."""
    told = [
        {"id": "q", "task": "short", "entity": "d", "source": "s", "scores": {"domain": 1.0}},
        {"id": "i", "task": "instruction", "entity": "k", "source": "s"}
        | {"scores": {"instruction_unseen": 1.0}},
    ]
    for kind, losses in values.items():
        for n, loss in enumerate(losses):
            row = {"id": f"{kind}-{n}", "task": "elsewhere", "entity": kind}
            row |= {"source": f"elsewhere {kind}"}
            told.append(row | {"scores": elsewhere.scores(kind, loss, 2 * abs(loss))})
    return told


def test_the_summary_has_each_kind_and_the_worst_in_nats():
    found = evaluate.summary(rows({"chat": [0.5, 1.5], "echo": [-2.0, -2.0]}), 200)
    chat = {"value": 1.0, "n": 2, "interval": [0.5, 1.5]}  # 1.0 and 0.0 are no shares here
    assert found["elsewhere_chat"] == chat and found["elsewhere"] == chat | {"kind": "chat"}
    assert found["elsewhere_echo"] == {"value": -2.0, "n": 2, "interval": [-2.0, -2.0]}
    assert found["elsewhere_kl"] == {"value": 4.0, "n": 2, "interval": [4.0, 4.0], "kind": "echo"}
    assert found["domain"]["n"] == 1
    ones = evaluate.summary(rows({"chat": [1.0, 0.0, 1.0]}), 200)["elsewhere_chat"]
    assert ones["interval"] == [0.0, 1.0]  # not Wilson's, which is for shares
    assert not any(name.startswith("elsewhere") for name in evaluate.summary(rows({}), 50))
    before, after = rows({"chat": [0.0]}), rows({"chat": [0.5]})
    assert set(evaluate.difference(before, after, 50)) == {"domain", "instruction_unseen"}


def test_arms_are_compared_on_their_worst_kind_in_each_draw():
    runs = [rows({"chat": [0.2, 0.4], "echo": [0.5, 0.0]}) for _ in range(2)]
    found = effects.draws(runs, 500)
    assert found["elsewhere"] == pytest.approx(
        [max(pair) for pair in zip(found["elsewhere_chat"], found["elsewhere_echo"], strict=True)]
    )
    assert found["elsewhere"][0] == pytest.approx(0.3) and found["elsewhere_kl"][0] > 0.5
    assert max(found["elsewhere"]) == pytest.approx(0.5)
    assert not any(" on " in name for name in found)  # no data sets of their own
    assert {"general", "hypervolume"} <= set(found)


def packed(whole, tmp_path):
    kept = recorded.pack([whole])
    (tmp_path / "r.json").write_text(recorded.as_json(kept))
    return recorded.read(tmp_path / "r.json")


def test_a_record_keeps_the_values_and_none_of_the_texts(whole, tmp_path):
    kept = packed(whole, tmp_path)
    text = (tmp_path / "r.json").read_text()
    for stage, known in report.item_rows(whole).items():
        for ours, row in zip(recorded.unpack(kept, "sft-0")[stage], known, strict=True):
            assert {k: ours[k] for k in recorded.ITEM} == {k: row[k] for k in recorded.ITEM}
            scores = {k: v for k, v in row["scores"].items() if v is not None}
            assert ours["scores"] == pytest.approx(scores, rel=1e-3)
            assert row["task"] != "elsewhere" or row["reply"] not in text
    assert not any("elsewhere" in s for r in kept["runs"]["sft-0"]["replies"].values() for s in r)


def test_the_table_of_arms_shows_it_where_it_is_known(whole, tmp_path):
    kept = packed(whole, tmp_path)
    head, _, base, sft = comparison.table(kept).splitlines()
    at = head.split(" | ").index("elsewhere (nats)")
    assert head.split(" | ")[at - 1] == "general"
    worst = read_json(whole / "evaluation.json")["grpo"]["elsewhere"]["value"]
    assert base.split(" | ")[at] == "0.000 [0.000, 0.000]"
    assert sft.split(" | ")[at].startswith(f"{worst:.3f} [")
    kept = {**kept, "items": [item for item in kept["items"] if item[1] != "elsewhere"]}
    for columns in kept["runs"]["sft-0"]["scores"].values():
        del columns["elsewhere"]
    assert "elsewhere" not in comparison.table(kept)  # a record of before


def test_a_run_measures_it_at_every_stage_and_says_so(whole):
    found = read_json(whole / "evaluation.json")
    kinds = [f"elsewhere{kl}_{kind}" for kl in ("", "_kl") for kind in corpus.FORMS]
    for stage in ("base", "sft", "grpo"):
        for name in (*kinds, "elsewhere", "elsewhere_kl"):
            told = found[stage][name]
            assert told["interval"][0] <= told["value"] <= told["interval"][1], name
            assert told["n"] == 5 and (stage != "base" or told["value"] == 0.0)
        assert found[stage]["elsewhere"]["kind"] in corpus.FORMS
        assert found[stage]["elsewhere"]["value"] == max(
            found[stage][k]["value"] for k in kinds[:5]
        )
    assert found["sft"]["elsewhere_kl"]["value"] > 0
    assert not any("elsewhere" in name for name in found["difference"]["sft-base"])
    assert set(found["kl"]) == {"sft", "sft_instruction", "grpo", "grpo_instruction"}
    lines = read_rows(whole / "evaluation" / "sft.jsonl")
    assert [r["task"] for r in lines[-25:]] == ["elsewhere"] * 25
    shown = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert not any("elsewhere" in key for row in shown for key in row["rewards"] or ())
    text = (whole / "report.md").read_text()
    table, _, after = text.partition("**Elsewhere: loss above the base's, nats a token**")
    assert "elsewhere" not in table and "| facts | 5 |" in after and "| **worst** |" in after
    worst = found["grpo"]["elsewhere"]
    assert f"{worst['kind']} {report.nats(worst)}" in after and "*No tax* means both" in after


def test_divergence_and_this_measure_read_the_same_logits(moved):
    """`beside_base` gives each row its own reply, whatever it is batched with."""
    model, tokenizer = moved
    encoded = [elsewhere._encode(tokenizer, e, 256) for e in TEXTS]
    for i, ours, bases in generation.beside_base(model, tokenizer, encoded):
        whole, asked = encoded[i]
        assert ours.shape == bases.shape == (len(whole) - asked, len(tokenizer))
        assert torch.allclose(ours.exp().sum(-1), torch.ones(len(ours)), atol=1e-4)
