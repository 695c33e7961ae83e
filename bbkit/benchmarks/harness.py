"""Public benchmarks through lm-evaluation-harness: `python -m bbkit.evaluate`.

Serves the claims on BIOMED-MMLU, MedQA and IFEval. Two protocols, since the choice between them
moves accuracy by ten points: `loglikelihood` by lm-eval's own tasks, and generated answers step by
step by the files in bbkit/benchmarks/tasks, in the kit's prompt (`kit`) and in nobody's
(`neutral`). The paper names no protocol; each figure carries its own.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bbkit import CannotRun, InputError, config, exit_code
from bbkit.benchmarks import scorecard
from bbkit.benchmarks.tasks import utils
from bbkit.machine import files, hub
from bbkit.runs import record

SUBJECTS = (
    "anatomy clinical_knowledge college_biology college_medicine medical_genetics "
    "professional_medicine"
).split()
CARDS = {
    "medqa": ("medqa", "test"),
    "biomed_mmlu": ("mmlu_medical", "test"),
    "pubmedqa": ("pubmedqa", "test"),
    "medmcqa": ("medmcqa", "validation"),  # upstream's test split has no labels
    "ifeval": ("ifeval", "test"),
}
# lm-eval's own tasks, each with the part of the card that it reads.
OWN: dict[str, dict[str, Any]] = {
    "medqa": {"medqa_4options": {}},
    "biomed_mmlu": {f"mmlu_{subject}": {"subjects": [subject]} for subject in SUBJECTS},
    "pubmedqa": {"pubmedqa": {}},
    "medmcqa": {"medmcqa": {}},
}
# The card's rows are all there is: no examples in the prompt, no other split.
ONE_SPLIT = {"test_split": "test", "training_split": None, "validation_split": None}
ONE_SPLIT |= {"fewshot_split": None}
KL_PROMPTS = 100  # each costs two forward passes over prompt and reply
PROTOCOLS = ("loglikelihood", "kit", "neutral")
FOLDER = Path(__file__).parent / "tasks"


def parser() -> argparse.ArgumentParser:
    """The options of `python -m bbkit.evaluate`."""
    p = argparse.ArgumentParser(
        prog="python -m bbkit.evaluate", description="Public benchmarks, with intervals."
    )
    p.add_argument("--model", metavar="NAME", help="Hub id, folder, .gguf file, or pocket")
    p.add_argument("--adapter", type=Path, metavar="DIR", help="measured with it and without")
    p.add_argument("--tasks", default=",".join(CARDS), help="some of %(default)s")
    p.add_argument("--protocols", default="loglikelihood,kit", help=f"of {', '.join(PROTOCOLS)}")
    p.add_argument("--limit", type=int, metavar="N", help="first N rows of each, of MMLU's subject")
    p.add_argument(
        "--shuffle", type=int, metavar="SEED",
        help="put the options in another order; not lm-eval's own for PubMedQA: yes, no, maybe",
    )  # fmt: skip
    p.add_argument("--preset", default="pocket", help="model settings and lengths: a preset")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one key of it")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the preset's, IFEval")
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="as for bbkit.train")
    p.add_argument("--offline", action="store_true", help="as for bbkit.train")
    p.add_argument("--out", type=Path, default=Path("runs/evaluation"), metavar="DIR")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints one line for a known error."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(given)
    command = ["python", "-m", "bbkit.evaluate", *given]
    return exit_code(lambda: _main(args, command))


def _main(args: argparse.Namespace, command: Sequence[str]) -> int:
    tasks = _known(args.tasks, CARDS, "--tasks")
    protocols = _known(args.protocols, PROTOCOLS, "--protocols")
    for name in ("limit", "batch_size", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: 1 or more")
    changed = [f"model.name={args.model}", "model.revision=null"] if args.model else []
    settings = config.load(args.preset, None, [*changed, *args.set])
    from bbkit import models

    hub.go_private(args.offline or settings.model.name == "pocket")
    for task in tasks:  # a file that is missing or changed is better found before the model
        utils.rows(**_source(task, args))
    model, tokenizer = models.load(settings.model, offline=args.offline)
    most = getattr(model.config, "max_position_embeddings", 2**31)
    length = args.max_new_tokens or min(settings.evaluation.ifeval_tokens, most // 2)
    if length >= most:
        raise InputError(f"--max-new-tokens {length}: the model's whole context is {most} tokens")
    facts: dict[str, Any] = {"model": model.origin, "adapter": str(args.adapter or "")}
    facts |= {"shuffle": args.shuffle, "max_new_tokens": length, "batch_size": args.batch_size}
    if args.adapter:
        model = models.load_adapter(model, args.adapter, trainable=False)
        facts["adapter_sha256"] = _digest((args.adapter / models.ADAPTER).read_bytes())
    with record.Run(args.out, facts, command, record.resolve_resume("auto", args.out)) as run:
        # Named by what answered: the keys inside are prompts alone.
        cache = run.folder / f"replies-{_digest(json.dumps(facts, sort_keys=True).encode())}"
        rows: list[dict] = []
        seconds: dict[str, float] = {}
        for name in ("base", "tuned") if args.adapter else ("base",):
            off = args.adapter and name == "base"
            with model.disable_adapter() if off else contextlib.nullcontext():
                lm = _cached(model, tokenizer, args.batch_size, Path(f"{cache}-{name}.db"))
                for task, protocol in _plan(tasks, protocols):
                    label = f"{name}/{task}/{protocol}"
                    found, took = measure(lm, task, protocol, args, length)
                    if name == "tuned" and protocol in ("kit", "ifeval"):
                        _distances(model, tokenizer, task, args, found[:KL_PROMPTS])
                    # A second session finds answers in the cache: the first one's time counts.
                    took = max(took, run.manifest["stages"].get(label, {}).get("seconds", 0.0))
                    run.done(label, seconds=took)
                    seconds[label] = took
                    about = {"model": name, "task": task, "protocol": protocol}
                    rows += [about | row for row in found]
                    print(scorecard.line(label, found), flush=True)
        files.write_rows(run.folder / "items.jsonl", rows)
        results = scorecard.results(rows, seconds)
        files.write_json(run.folder / "evaluation.json", results)
        scorecard.write(run.folder, results, run.manifest)
    print(f"report: {args.out / 'report.md'}")
    return 0


def _known(text: str, known: Any, option: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise InputError(f"{option} {text}: {', '.join(wrong) or 'none'} unknown; "
                         f"use some of {', '.join(known)}")  # fmt: skip
    return names


def _plan(tasks: Sequence[str], protocols: Sequence[str]) -> list[tuple[str, str]]:
    """IFEval has one protocol: replies to its prompts as they stand."""
    return [
        (task, "ifeval" if task == "ifeval" else protocol)
        for task in tasks
        for protocol in (protocols[:1] if task == "ifeval" else protocols)
    ]


def _source(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Where a task's rows are from, as `utils.rows` wants to know."""
    card, split = CARDS[task]
    source = {"card": card, "split": split, "shuffle": args.shuffle, "limit": args.limit}
    return source | {"data_dir": str(args.data_dir) if args.data_dir else None}


def measure(
    lm, task: str, protocol: str, args: argparse.Namespace, length: int
) -> tuple[list[dict[str, Any]], float]:
    """Item rows of one task by one protocol, {"id", "gold", "answer", "right", …}, and seconds."""
    from lm_eval import evaluator

    asked = protocol != "loglikelihood"
    limits = {"until": [], "do_sample": False, "max_gen_toks": length}
    changed: dict[str, Any] = {"generation_kwargs": limits} if asked else {**ONE_SPLIT}
    if protocol == "neutral":
        changed |= {"doc_to_text": utils.neutral, "description": ""}
    source = _source(task, args)
    if task == "pubmedqa" and not asked:  # lm-eval has its options by heart
        source["shuffle"] = None
    members = [
        {"task": name, "custom_dataset": utils.rows, **changed} | {"dataset_kwargs": source | part}
        for name, part in ({f"bbkit_{task}": {}} if asked else OWN[task]).items()
    ]
    # It tells a line per task of what its files say; its progress bars stay.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        # As a group: only its members are registered tasks with other settings.
        loaded = _manager().load({"group": "benchmark", "task": members})
        start = time.perf_counter()
        found = evaluator.evaluate(lm, loaded, bootstrap_iters=0, apply_chat_template=asked)
    seconds = time.perf_counter() - start
    room = lm.max_length - length * asked
    samples = [sample for some in found["samples"].values() for sample in some]
    rows = [_item(sample, protocol) for sample in samples]
    for sample, row in zip(samples, rows, strict=True):
        row["cut"] = len(lm.tok_encode("".join(sample["arguments"][0][:1]))) > room
    return rows, seconds


def _manager() -> Any:
    """lm-eval's tasks of these benchmarks, and the kit's: all 14,000 files take ten seconds."""
    from lm_eval import tasks

    own = Path(tasks.__file__).parent
    folders = [str(own / name) for name in ("medqa", "mmlu/default", "medmcqa", "pubmedqa")]
    return tasks.TaskManager(include_path=[*folders, str(FOLDER)], include_defaults=False)


def _cached(model, tokenizer, batch_size: int, file: Path):
    """lm-eval's model with its cache, which keeps each answer as it comes.

    As JSON: the cache pickles, and a folder from somewhere else could then run code.
    """
    try:
        from lm_eval.api.model import CachingLM
        from lm_eval.models.huggingface import HFLM
        from sqlitedict import SqliteDict
    except ImportError as error:
        raise CannotRun(f"benchmarks lack {error.name}: pip install -e '.[eval]'") from error
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    cached = CachingLM(lm, str(file))
    cached.dbdict.close()
    cached.dbdict = SqliteDict(str(file), autocommit=True, encode=json.dumps, decode=json.loads)
    lm.set_cache_hook(cached.get_cache_hook())
    return cached


def _item(sample: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """One row per question: what statistics count and what a reader looks up."""
    doc, prompt = sample["doc"], sample["arguments"][0][0]
    row = {"id": doc["id"], "entity": doc["entity"], "prompt": _digest(prompt.encode())}
    if protocol == "ifeval":
        row |= {name: sample[name] for name in (*scorecard.FOUR, "answer_strict")}
        return row | {"kinds": doc["instruction_id_list"], "reply": sample["resps"][0][0]}
    if protocol != "loglikelihood":
        row["reply"] = sample["resps"][0][0]
        letter = utils.read_choice(utils.example(doc), row["reply"])
    else:
        likelihoods = [response[0] for response in sample["filtered_resps"]]
        row["loglikelihoods"] = likelihoods
        letter = utils.LETTERS[likelihoods.index(max(likelihoods))]
    return row | {"gold": doc["letter"], "answer": letter, "right": float(sample["acc"])}


def _distances(model, tokenizer, task: str, args: argparse.Namespace, found: list[dict]) -> None:
    """Put KL(tuned, base) along the replies into item rows; see `generation.divergence`."""
    from bbkit.machine import generation

    docs = {doc["id"]: doc for doc in utils.rows(**_source(task, args))["test"]}
    examples = [utils.example(docs[row["id"]]) for row in found]
    values = generation.divergence(model, tokenizer, examples, [row["reply"] for row in found])
    for row, value in zip(found, values, strict=True):
        row["kl"] = value


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
