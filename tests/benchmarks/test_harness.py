"""Public benchmarks by `python -m bbkit.evaluate`, on rows made here."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bbkit import config, data, models, prompts
from bbkit.benchmarks import harness, scorecard
from bbkit.benchmarks.tasks import utils
from bbkit.machine.files import read_rows
from bbkit.prompts import Example

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

OPTIONS = ("a virus", "a worm", "a fungus", "a bacterium")


def choice(n: int, card: str, entity: str = "", options=OPTIONS, context="") -> Example:
    question = f"What causes disease number {n}?"
    fields = {"options": options, "answer": options[n % len(options)], "entity": entity or str(n)}
    return Example(f"{n:04d}", "choice", question, context, source=card, **fields)


MADE = {
    "medqa": [choice(n, "medqa") for n in range(5)],
    "mmlu_medical": [
        choice(10 * s + n, "mmlu_medical", subject)
        for s, subject in enumerate(harness.SUBJECTS)
        for n in range(3)
    ],
    "pubmedqa": [
        choice(n, "pubmedqa", options=("yes", "no", "maybe"), context="It was seen.")
        for n in range(3)
    ],
    "medmcqa": [choice(n, "medmcqa") for n in range(3)],
    "ifeval": [
        Example(
            str(n), "instruction", "Write a line without commas.", source="ifeval",
            constraints=({"kind": "punctuation:no_comma"},
                         {"kind": "length_constraints:number_words", "relation": "less than",
                          "num_words": 20}),
        )
        for n in range(3)
    ],
}  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(data, "load", lambda card, split, *_, **__: MADE[card])


def run(out, *options) -> int:
    short = ["--max-new-tokens", "6", "--batch-size", "4"]
    return harness.main([*short, "--out", str(out), *options])


def test_every_task_by_every_protocol(made, tmp_path, capsys):
    assert run(tmp_path, "--protocols", "loglikelihood,kit,neutral", "--limit", "2") == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["base"]
    places = {f"{t}/{p}" for t in harness.OWN for p in harness.PROTOCOLS} | {"ifeval/ifeval"}
    assert set(found) == places
    assert found["medqa/kit"]["accuracy"]["n"] == 2
    assert found["biomed_mmlu/kit"]["accuracy"]["n"] == 12  # two of each subject
    assert set(found["biomed_mmlu/loglikelihood"]["groups"]) == set(harness.SUBJECTS)
    assert set(found["ifeval/ifeval"]["groups"]) == {"punctuation", "length_constraints"}
    assert all(row["seconds"] > 0 and len(row["prompt"]) == 12 for row in found.values())
    report = (tmp_path / "report.md").read_text()
    for place in places:
        assert f"| {place.replace('/', ' | ')} |" in report
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"groups.png"}
    assert "Run it again" in report and "python -m bbkit.evaluate" in report


def test_a_second_call_asks_the_model_nothing_twice(made, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    options = ("--tasks", "medqa,ifeval", "--limit", "3")
    assert run(tmp_path, *options) == 0
    first = [(tmp_path / name).read_bytes() for name in ("evaluation.json", "items.jsonl")]

    def asked(*_, **__):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(HFLM, "_model_call", asked)
    monkeypatch.setattr(HFLM, "_model_generate", asked)
    assert run(tmp_path, *options) == 0
    assert first == [(tmp_path / name).read_bytes() for name in ("evaluation.json", "items.jsonl")]
    with pytest.raises(AssertionError, match="asked again"):
        run(tmp_path, "--tasks", "medqa", "--limit", "4")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lm_evals_own(model, tokenizer, places, batch_size=4):
    """Samples of lm-eval's own tasks, its own reader of its own columns, from {task: file}."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    members = [
        {"task": name, "dataset_path": "json", "dataset_name": None,
         "dataset_kwargs": {"data_files": {"test": str(path)}}, **harness.ONE_SPLIT}
        for name, path in places.items()
    ]  # fmt: skip
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    tasks = harness._manager().load({"group": "own", "task": members})
    return evaluator.evaluate(lm, tasks, bootstrap_iters=0)["samples"]


def test_log_likelihoods_are_those_of_lm_evals_own_task_on_the_same_file(made, tmp_path):
    assert run(tmp_path, "--tasks", "medqa,biomed_mmlu", "--protocols", "loglikelihood") == 0
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    anatomy = [e for e in MADE["mmlu_medical"] if e.entity == "anatomy"]
    gold = [e.options.index(e.answer) for e in MADE["medqa"] + anatomy]
    rows = [
        {"sent1": e.question, **{f"ending{i}": text for i, text in enumerate(e.options)}}
        for e in MADE["medqa"]
    ]
    places = {
        "medqa_4options": write_rows(
            tmp_path / "medqa.jsonl",
            [row | {"label": g} for row, g in zip(rows, gold, strict=False)],
        ),
        "mmlu_anatomy": write_rows(
            tmp_path / "mmlu.jsonl",
            [
                {"question": e.question, "choices": list(e.options), "answer": g}
                for e, g in zip(anatomy, gold[len(rows) :], strict=True)
            ],
        ),
    }
    model, tokenizer = models.load(config.load("pocket").model, say=lambda line: None)
    own = lm_evals_own(model, tokenizer, places)
    for name, card, examples in (
        ("medqa_4options", "medqa", MADE["medqa"]),
        ("mmlu_anatomy", "biomed_mmlu", anatomy),
    ):
        ours = {row["id"]: row for row in items if row["task"] == card}
        assert len(own[name]) == len(examples)
        for example, sample in zip(examples, own[name], strict=True):
            row = ours[example.id]
            assert row["right"] == sample["acc"]
            theirs = [response[0] for response in sample["filtered_resps"]]
            assert row["loglikelihoods"] == pytest.approx(theirs, abs=1e-4)


def test_the_kits_prompt_is_the_one_that_is_trained_on_and_the_neutral_one_nobodys(made, tmp_path):
    assert run(tmp_path, "--tasks", "pubmedqa", "--protocols", "kit,neutral") == 0
    items = read_rows(tmp_path / "items.jsonl")
    _, tokenizer = models.load(config.load("pocket").model, say=lambda line: None)
    plain = [[{"role": "user", "content": utils.neutral(utils._row(e))}] for e in MADE["pubmedqa"]]
    asked = [*map(prompts.messages, MADE["pubmedqa"]), *plain]
    for messages, row in zip(asked, items, strict=True):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert row["prompt"] == harness._digest(text.encode())


def test_with_an_adapter_both_are_measured_and_compared(made, tmp_path):
    settings = config.load("pocket")
    model, _ = models.load(settings.model, say=lambda line: None)
    model = models.add_lora(model, settings.model, 0)
    models.save_adapter(model, tmp_path / "same")
    options = ("--tasks", "medqa,ifeval", "--protocols", "kit", "--limit", "2")
    assert run(tmp_path / "out", *options, "--adapter", str(tmp_path / "same")) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for place in ("medqa/kit", "ifeval/ifeval"):
        change = found["difference"][place]
        assert (change["value"], change["p"], change["p_holm"]) == (0, 1, 1)
        assert found["tuned"][place]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert (tmp_path / "out" / "figures" / "front.png").exists()
    assert run(tmp_path / "out", *options) == 2  # another model in the same folder


def test_differences_have_their_sign_and_a_family():
    rows = []
    for name, rights in (("base", [1, 1, 0, 0]), ("tuned", [1, 1, 1, 1])):
        for place in ("kit", "neutral"):
            for i, right in enumerate(rights):
                row = {"model": name, "task": "medqa", "protocol": place, "id": str(i)}
                row |= {"entity": str(i), "prompt": "p", "right": float(right), "answer": "A"}
                rows.append(row | {"reply": "A", "gold": "A"})
    found = scorecard.results(rows, {})["difference"]
    assert found["medqa/kit"]["value"] == 0.5 and found["medqa/kit"]["gained"] == 2
    assert found["medqa/kit"]["p"] == 0.5 and found["medqa/kit"]["p_holm"] == 1.0


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("<reasoning>So.</reasoning><answer>B</answer>", "B"),
        ("<answer>a worm</answer>", "B"),
        ("<answer>B) a virus</answer>", None),  # letter and text disagree
        ("<answer>**B**</answer>", "B"),
        ("<answer>Option B</answer>", "B"),
        ("<answer>The answer is B</answer>", "B"),
        ("<answer>B) a worm (Ascaris)</answer>", "B"),
        ("<answer>\\boxed{B}</answer>", "B"),
        ("<answer>B or C</answer>", None),
        ("Thinking. The answer is (C).", "C"),
        ("", None),
        ("La respuesta es clara: el gusano.", None),
        ("x" * 1_000_000, None),
        ("The answer is (A). The answer is (B).", None),
    ],
)
def test_what_a_reply_commits_to(reply, letter):
    doc = utils._row(MADE["medqa"][0])
    assert utils.read_choice(utils.example(doc), reply) == letter
    measures = utils.score(doc, [reply])
    assert measures["parsed"] == float(letter is not None)
    assert measures["acc"] == float(letter == "A")


def test_shuffling_moves_options_and_keeps_the_right_one(made):
    plain, mixed = (utils.rows("medqa", shuffle=seed)["test"] for seed in (None, 3))
    assert [r["options"] for r in plain] != [r["options"] for r in mixed]
    for a, b in zip(plain, mixed, strict=True):
        assert sorted(a["options"]) == sorted(b["options"])
        assert a["options"][a["answer"]] == b["options"][b["answer"]]
        assert b["letter"] == "ABCD"[b["answer"]]


def test_pubmedqas_prompt_is_lm_evals_own(data_dir):
    """Whose sections stand on lines of their own, and whose options lm-eval has by heart."""
    from lm_eval.tasks.pubmedqa.preprocess_pubmedqa import doc_to_text

    rows = utils.rows("pubmedqa", data_dir=str(data_dir), limit=20)["test"]
    upstream = json.loads((data_dir / "pubmedqa" / "ori_pqal.json").read_text())
    assert all(doc_to_text(row) == doc_to_text(upstream[row["id"]]) for row in rows)
    assert all("\n" not in prompts.messages(utils.example(r))[-1]["content"].split("\n\n")[0]
               for r in rows)  # fmt: skip


def test_shuffling_leaves_lm_evals_pubmedqa_alone(made, monkeypatch, tmp_path):
    """Its letters are those of yes, no and maybe, as its items say."""
    seen = []
    monkeypatch.setattr(utils, "_shuffled", lambda e, seed: seen.append(e.id) or e)
    options = ["--tasks", "pubmedqa", "--shuffle", "1", "--limit", "2", "--max-new-tokens", "4"]
    assert harness.main([*options, "--protocols", "loglikelihood", "--out", str(tmp_path)]) == 0
    assert seen == ["0000", "0001", "0002"][:2]  # looked at before the model, and no more


def test_the_task_files_are_found_by_name():
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=str(harness.FOLDER), include_defaults=False).all_tasks
    assert set(known) == {f"bbkit_{task}" for task in harness.CARDS}
    assert f"description: {prompts.SYSTEM}" in (harness.FOLDER / "_chain_yaml").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "medqa,usmle"], "--tasks medqa,usmle: usmle unknown"),
        (["--protocols", ""], "--protocols : none unknown"),
        (["--limit", "0"], "--limit 0: 1 or more"),
        (["--max-new-tokens", "100000", "--tasks", "medqa"], "whole context is"),
        (["--adapter", "nowhere", "--tasks", "medqa"], "nowhere: no adapter here"),
    ],
)
def test_bad_options_in_one_line(made, tmp_path, capsys, options, said):
    assert harness.main(["--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_missing_subject_is_named(tmp_path, capsys):
    folder = tmp_path / "data" / "mmlu"
    folder.mkdir(parents=True)
    (folder / "anatomy_test.csv").write_text("Which?,a,b,c,d,A\n")
    options = ["--tasks", "biomed_mmlu", "--data-dir", str(tmp_path / "data")]
    assert harness.main([*options, "--out", str(tmp_path / "out")]) == 2
    assert "clinical_knowledge_test.csv" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_scores_as_under_lm_eval_item_by_item(data_dir, tmp_path):
    """Six MMLU subjects and 100 rows of MedQA, which lm-eval reads from the upstream files."""
    gguf = os.environ.get("BBKIT_GGUF")
    if not gguf:
        pytest.skip("set BBKIT_GGUF to the file of data_cards/README.md#smollm2-without-the-hub")
    model = ["--preset", "smollm2-cpu", "--model", gguf, "--set", "model.quantization=none"]
    words = [*model, "--protocols", "loglikelihood", "--data-dir", str(data_dir)]
    for task in ("medqa", "biomed_mmlu"):
        limit = ["--limit", "100"] if task == "medqa" else []
        out = ["--out", str(tmp_path / task)]
        assert harness.main([*words, "--tasks", task, *limit, *out]) == 0
    places, orders = {}, {}
    upstream = data_dir / "medqa" / "phrases_no_exclude_test.head100.jsonl"
    rows = [json.loads(line) for line in upstream.read_text().splitlines()][:100]
    places["medqa_4options"] = write_rows(
        tmp_path / "medqa.jsonl",
        [
            {"sent1": r["question"], "label": "ABCD".index(r["answer_idx"])}
            | {f"ending{i}": r["options"][letter] for i, letter in enumerate("ABCD")}
            for r in rows
        ],
    )
    orders["medqa_4options"] = [f"{n:04d}" for n in range(len(rows))]
    for subject in harness.SUBJECTS:
        with (data_dir / "mmlu" / f"{subject}_test.csv").open(newline="") as file:
            cells = list(csv.reader(file))
        places[f"mmlu_{subject}"] = write_rows(
            tmp_path / f"{subject}.jsonl",
            [{"question": q, "choices": c, "answer": "ABCD".index(a)} for q, *c, a in cells],
        )
        orders[f"mmlu_{subject}"] = [f"{subject}-{n:03d}" for n in range(len(cells))]
    settings = config.load(
        "smollm2-cpu", overrides=[f"model.name={gguf}", "model.revision=null", *model[5:]]
    )
    own = lm_evals_own(*models.load(settings.model, say=lambda line: None), places, 8)
    items = [
        r for task in ("medqa", "biomed_mmlu") for r in read_rows(tmp_path / task / "items.jsonl")
    ]
    ours = {row["id"]: row for row in items}
    for name, ids in orders.items():
        assert len(own[name]) == len(ids)
        for key, sample in zip(ids, own[name], strict=True):
            assert ours[key]["right"] == sample["acc"], key
            theirs = [response[0] for response in sample["filtered_resps"]]
            assert ours[key]["loglikelihoods"] == pytest.approx(theirs, abs=1e-3), key
    assert len(items) == sum(map(len, orders.values())) == 1189


@pytest.mark.slow
def test_killed_and_started_again_it_repeats_no_finished_item(data_dir, tmp_path):
    command = [sys.executable, "-m", "bbkit.evaluate", "--tasks", "biomed_mmlu,ifeval"]
    command += ["--limit", "20", "--max-new-tokens", "32", "--batch-size", "4"]
    command += ["--data-dir", str(data_dir), "--out"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ}}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, **quiet)
    for seconds in (25, 40, 50):
        started = subprocess.Popen([*command, str(tmp_path / "cut")], **quiet)
        time.sleep(seconds)
        started.send_signal(signal.SIGKILL)
        started.wait()
    subprocess.run([*command, str(tmp_path / "cut")], check=True, **quiet)
    whole, cut = ((tmp_path / name / "items.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
