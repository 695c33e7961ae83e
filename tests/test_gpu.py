"""What a GPU alone can tell: agreement of 4-bit maps and of one pass, memory, time, whole runs.

Skipped without one. BBKIT_GPU_TINY=1 runs all of it in tiny shapes on a CPU, without the bounds on
memory and time: to find mistakes before a GPU's minutes are spent. `tests/gpu_visit.py` runs it in
order of value. Models have random weights in the true shapes and pocket's tokenizer, as no Hub is
there: time, memory and agreement are measured, and pocket alone learns. The bounds are predictions.
"""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import PASSES, STEPS, moved
from torch.nn.functional import cosine_similarity

from bbkit import config, gradients, models
from bbkit.data.replies import Reply
from bbkit.machine import gpu, hub, loading, memory
from bbkit.machine.files import read_json, read_rows
from bbkit.runs import record
from bbkit.study import benchmark, timing, variants

CUDA, TINY = torch.cuda.is_available(), os.environ.get("BBKIT_GPU_TINY") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not TINY, reason=f"no CUDA GPU: {gpu.obstacle()}"),
]
DEVICE = "cuda" if CUDA and not TINY else "cpu"
SHAPES = {"0.5B": "t4", "7B": "24gb"}  # of Qwen2.5, and the preset that trains it
SMALL = (128, 2, 4, 2, 256, 5120, True, 32768)  # in place of memory.PUBLISHED where it is tiny
BASE = ["model.revision=", "model.backend=transformers", f"model.device={DEVICE}"]
LESS = ["model.dtype=float32", "model.max_length=256", "grpo.max_completion_length=16",
        "grpo.prompts=2", "grpo.generations=4", "grpo.micro_batch_size=4",
        "evaluation.max_new_tokens=16", "retention.max_new_tokens=16"]  # fmt: skip
METHOD = ["grpo.advantages=capability", "grpo.controller.rule=deficit",
          "grpo.combination=dual_cone"]  # fmt: skip
QUICK = ["sft.steps=4", "grpo.steps=3", "grpo.prompts=8", "evaluation.questions=8",
         "evaluation.instructions=4", "evaluation.bootstrap=50", "evaluation.elsewhere=2",
         "retention.replies=8", "retention.per_step=2", "sft.batch_size=8",
         "sft.micro_batch_size=4", "grpo.micro_batch_size=32"]  # fmt: skip


@pytest.fixture(scope="session")
def figure():
    """`figure(name, **values)` prints a line and adds it to the file that BBKIT_GPU_ROWS names."""
    found = record.machine()
    names = ("torch", "transformers", "bitsandbytes")
    facts = {"card": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU, tiny shapes"}
    facts |= {name: found["versions"].get(name) for name in names}
    facts["commit"] = found["git"]["commit"] or os.environ.get("BBKIT_GPU_COMMIT")

    def write(name: str, **values) -> None:
        print(line := json.dumps({"name": name, "values": values, **facts}))
        if path := os.environ.get("BBKIT_GPU_ROWS"):
            with Path(path).open("a") as file:
                file.write(line + "\n")

    return write


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where model folders are made; BBKIT_GPU_WORK: and left for the next process."""
    given = os.environ.get("BBKIT_GPU_WORK")
    return Path(given) if given else tmp_path_factory.mktemp("models")


def clear() -> None:
    variants._capture.cache_clear()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def in_shape(size: str, folder: Path, *keys: str):
    """Settings of its preset, a model with LoRA in the shape of a published one, tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = folder / size
    if not path.exists():
        known = SMALL if TINY else memory.PUBLISHED[f"Qwen/Qwen2.5-{size}-Instruct"]
        dims = dict(zip(memory.FIELDS, known, strict=True))
        torch.manual_seed(0)
        with torch.device(DEVICE):
            shape = AutoConfig.for_model("qwen2", **dims, rms_norm_eps=1e-6)
            made = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        half = folder / f".{size}-{os.getpid()}"  # a test may be killed while it writes
        made.save_pretrained(half)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(hub.POCKET / file, half)
        half.rename(path)
        del made
        clear()
    every = [*BASE, f"model.name={path}", "model.dtype=bfloat16", *keys, *(LESS if TINY else [])]
    settings = config.load(SHAPES[size], None, every)
    return settings, *timing.lora_model(settings)


def words(out: Path, keys: list[str]) -> list[str]:
    """What bbkit.train is told for a run of pocket."""
    return ["--preset", "pocket", "--offline", "--out", str(out), *(f"--set={k}" for k in keys)]


def apart(found, wanted) -> float:
    """The relative error, the largest over rows."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_nf4(dtype, figure):
    """bitsandbytes' map against its weights unpacked in float64: batches meet three kernels."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit

    worst = dict.fromkeys(("forward", "without gradients", "backward"), 0.0)
    for rows in (1, 64, 1024, 4096):
        torch.manual_seed(rows)
        wide, deep = (256, 128) if TINY else (18944, 3584)
        kind = getattr(torch, dtype)
        layer = bnb.nn.Linear4bit(deep, wide, bias=False, compute_dtype=kind, quant_type="nf4")
        layer = layer.to(DEVICE)
        loading.protect_4bit(layer)
        x = torch.randn(rows, deep, device=DEVICE, dtype=kind, requires_grad=True)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
        out = layer(x)
        up = torch.randn_like(out)
        out.backward(up)
        with torch.no_grad():
            bare = layer(x)
        wanted = (x.detach().double() @ weight.T).flatten()
        found = (apart(out.detach().flatten(), wanted), apart(bare.flatten(), wanted),
                 apart(x.grad.flatten(), (up.double() @ weight).flatten()))  # fmt: skip
        worst = {k: max(v, now) for (k, v), now in zip(worst.items(), found, strict=True)}
    figure(f"NF4 map in {dtype} against float64, worst of 1 to 4,096 rows", **worst)
    # predicted: 2.3e-3 in bfloat16, 3e-4 in float16, where each weight and each sum is rounded
    assert max(worst.values()) < {"bfloat16": 5e-3, "float16": 8e-4, "float32": 1e-5}[dtype], worst


# A product of bfloat16 is rounded to 4e-3, by sequence in one pass and by capability in K.
@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 2e-2), ("float32", 1e-4)])
def test_onepass(dtype, most, figure, folder, monkeypatch):
    """One pass against K passes, on 4 bit with LoRA and checkpointing; and what it costs over K."""
    settings, model, _ = in_shape("0.5B", folder, f"model.dtype={dtype}")
    assert settings.model.gradient_checkpointing and settings.model.quantization == "nf4"
    moved(model, 0.02)
    count, tokens = (4, 32) if TINY else (8, 512)
    ids, shares = variants.random_batch(model, count, tokens, 3)

    def terms():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            return variants.terms(model, ids)

    with gradients.capability_gradients(model, shares) as one:
        terms().sum().backward()

    def replayed():
        capture = gradients.Capture(model, 3)
        for k in range(3):
            (shares[:, k] * terms()).sum().backward()
            capture.take(k)
        return capture.gradients

    again, twice = replayed(), replayed()
    error, noise = apart(one.gradients, again), apart(twice, again)
    likeness = cosine_similarity(one.gradients, again).min().item()
    figure(f"one pass against 3 passes in {dtype}", error=error, noise=noise, cosine=likeness)
    assert not one.missed and again.any(1).all()
    assert error < max(most, 3 * noise) and likeness > 1 - most, (error, noise, likeness)
    if dtype == "float32":
        return
    kept = {k: variants.VARIANTS[k] for k in ("plain", "one_pass", "replay")}
    monkeypatch.setattr(variants, "VARIANTS", kept)
    times: dict[str, float] = {}
    for kinds in (1, 2, 4, 8):
        found = variants.backward_ratios(model, kinds, count, tokens, 1 if TINY else 3)
        times |= {f"one pass, K={kinds}": found["one_pass"]["both"]}
        times |= {f"K passes, K={kinds}": found["replay"]["both"]}
    figure("forward and backward in times of plain TRL's", **times)
    if DEVICE == "cuda":  # predicted: 1.05
        assert all(times[f"one pass, K={kinds}"] < 1.15 for kinds in (1, 2, 4, 8)), times


def test_retention(figure, tmp_path):
    """Both rules on a trainer of the kit keep a model nearer to its base than none does."""
    from bbkit import sft, train
    from bbkit.data import broad

    steps, replies = (6, 16) if TINY else (40, 128)
    keys = [*BASE, "model.quantization=nf4", "model.dtype=auto", f"sft.steps={steps}",
            "sft.warmup_steps=0", "sft.scheduler=constant", f"retention.replies={replies}",
            "data.limits.grpo=50", "retention.prompts=[pocket_prompts]"]  # fmt: skip
    if TINY:
        keys += ["sft.batch_size=8", "sft.micro_batch_size=8", "retention.max_new_tokens=16",
                 "retention.per_step=8"]  # fmt: skip
    ways = {"none": ["retention.weight=0"], "penalty": [], "step": ["retention.rule=step"]}
    last: dict[str, float] = {}
    for name, more in ways.items():
        settings = config.load("pocket", None, [*keys, *more])
        rows = train.load_rows(settings, None)
        model, tokenizer = timing.lora_model(settings)
        kept = broad.of_run(tmp_path / "replies", model, tokenizer, settings, [], None)
        given = (model, tokenizer, rows["sft"], settings, tmp_path / name)
        trainer = sft.build(*given, replies=kept)
        trainer.train()
        logged = [x["retention/kl"] for x in trainer.state.log_history if "retention/kl" in x]
        seen = torch.tensor(logged)
        assert len(seen) == steps and seen.isfinite().all(), seen
        last[name] = seen[-steps // 4 :].mean().item()
    figure("KL to the base at the end of SFT, nats a token", **last)
    most = (0.9 if TINY else 0.5) * last["none"]  # on a CPU: 0.029, 0.064 and 0.380 with none
    assert max(last["penalty"], last["step"]) < most, last


@pytest.mark.parametrize("way", ["preset", "method"])
def test_float16(way, figure, tmp_path, monkeypatch):
    """A run ends well though float16's scaler, begun far too high, leaves steps out."""
    from bbkit import train

    init = torch.amp.GradScaler.__init__

    def high(self, *words, **options):
        init(self, *words, **options | {"init_scale": 2.0**26})

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", high)
    keys = [*BASE, *QUICK, "model.quantization=nf4", "model.gradient_checkpointing=true",
            "sft.optimizer=adamw_8bit", "grpo.optimizer=adamw_8bit", "sft.steps=24",
            "grpo.steps=24", "sft.warmup_steps=0", "model.dtype=float16"]  # fmt: skip
    keys += [*METHOD, "grpo.metric=step", "retention.rule=step"] if way == "method" else []
    keys += ["model.dtype=float32", "sft.steps=3", "grpo.steps=2"] if TINY else []
    out = tmp_path / "run"
    began = time.perf_counter()
    assert train.main(words(out, keys)) == 0
    rows = read_rows(out / "metrics.jsonl")
    skipped = {s: sum("skipped" in r for r in rows if r["stage"] == s) for s in ("sft", "grpo")}
    figure(f"float16, {way}: steps left out of {len(rows)}", **skipped,
           seconds=time.perf_counter() - began)  # fmt: skip
    tensors = safetensors.torch.load_file(out / "adapter" / models.ADAPTER)
    assert all(t.isfinite().all() for t in tensors.values())
    if DEVICE == "cuda":
        assert all(skipped.values()), "nothing was tried: begin at a higher scale"
        ends = [r for r in rows if r["step"] == 24]
        assert len(ends) == 2 and not any("skipped" in r for r in ends), "it never settled"


def filling(tokenizer, room: int, replied: bool):
    """A question whose prompt, or prompt and gold reply, fill so many tokens: the peak is there."""
    from bbkit import prompts
    from bbkit.data import questions

    example = questions.ontology("train")[0]
    reply = prompts.completion(example) if replied else ""

    def of(words: int):
        return dataclasses.replace(example, context="fever " * words)

    short, long = (len(prompts.encode(tokenizer, of(n), reply)[0]) for n in (10, 110))
    found = of(10 + int(100 * (room - short) / (long - short)))
    assert room - 20 < len(prompts.encode(tokenizer, found, reply)[0]) <= room + 1
    return found


def steps_of(size: str, folder: Path, work: Path, figure, card: float = 0.0) -> tuple:
    """A step of SFT and one of GRPO at the preset's longest, with so many GiB: bytes, seconds."""
    from bbkit import grpo, sft

    settings, model, tokenizer = in_shape(size, folder, *METHOD)
    plan = memory.plan(settings, next(model.parameters()).dtype, DEVICE, offline=True)
    if card and DEVICE == "cuda":
        clear()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, card * 2**30 / total))
    longest, kept = settings.model.max_length, settings.retention.max_new_tokens
    ids = torch.randint(4000, (settings.retention.per_step, kept)).tolist()
    replies = [Reply("", "", "", row, row) for row in ids]
    for stage, build, room in (
        ("sft", sft.build, longest),
        ("grpo", grpo.build, longest - settings.grpo.max_completion_length),
    ):
        given = [filling(tokenizer, room, stage == "sft")] * 64
        trainer = timing.ready(build(model, tokenizer, given, settings, work, replies=replies))
        took: list[float] = []

        def run(trainer=trainer, took=took, times=2 if stage == "sft" else 1):  # the first warms up
            took += [timing.step(trainer) for _ in range(times)]

        peak = timing.peak_of(run) / 1e9
        planned = (plan[stage]["peak"] - plan[stage]["process"]) / 1e9  # torch counts no context
        reserved = torch.cuda.max_memory_reserved() / 1e9 if DEVICE == "cuda" else 0.0
        figure(f"{size} shape, preset {SHAPES[size]}, a step of {stage}", seconds=took[-1],
               peak_gb=peak, planned_gb=planned, reserved_gb=reserved)  # fmt: skip
        assert DEVICE == "cpu" or 0.4 * planned < peak < 1.1 * planned, (stage, plan[stage])
        assert getattr(trainer, "gradient_engine", "one_pass") == "one_pass"
        assert "retention/kl" in trainer._noted
        del trainer, run
        clear()
    return took[-1], model, tokenizer


def test_shape05(figure, folder, tmp_path):
    """The 0.5B shape at `t4`'s lengths, in bfloat16; and capability-aware beside TRL's trainer."""
    took, model, tokenizer = steps_of("0.5B", folder, tmp_path, figure)
    asked = "--generations 8 --tokens 512 --rounds 2"
    given = benchmark.parser().parse_args(("--tokens 32 --rounds 1" if TINY else asked).split())
    found = variants.step_ratios(model, tokenizer, 3, given)["one_pass"]
    figure("0.5B shape, step of 3 rewards in times of plain TRL's", **found)
    if DEVICE == "cuda":  # predicted: 8 to 11 s, 1.00 to 1.03
        assert took < 20 and max(found.values()) < 1.15, (took, found)


def test_shape7(figure, folder, tmp_path):
    """The 7B shape at `24gb`'s lengths, with what a card of 24 GB has beside its context."""
    took, *_ = steps_of("7B", folder, tmp_path, figure, card=23)
    assert DEVICE == "cpu" or took < 70  # predicted: 30 to 40 s


def test_export(figure, folder):
    """Merging the 7B shape on the CPU asks little of the card."""
    _, model, _ = in_shape("7B", folder)
    moved(model, 0.02)
    before, began = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0, gpu.now()
    found: list = []
    peak = timing.peak_of(lambda: found.append(models.merge(model, torch.bfloat16)))
    seconds = gpu.now() - began
    figure("7B shape, merge", seconds=seconds, on_the_card_gb=(peak - before) / 1e9)
    assert {p.device.type for p in found[0].parameters()} == {"cpu"}
    assert DEVICE == "cpu" or peak - before < 1e9


def test_pocket(figure, tmp_path):
    """A whole run, twice, and a third time stopped on the way: seconds, and whether bit-equal."""
    keys = [*BASE, *(QUICK if TINY else [])]

    def begun(name: str):
        command = [sys.executable, "-m", "bbkit.train", *words(tmp_path / name, keys)]
        with (tmp_path / f"{name}.log").open("a") as log:
            run = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
        stack.callback(run.kill)  # where an assertion fails
        return run

    def ended(name: str, run, code: int) -> None:
        assert run.wait() == code, (tmp_path / f"{name}.log").read_text()[-2000:]

    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        runs = {name: begun(name) for name in ("one", "two", "cut")}
        rows = tmp_path / "cut" / "metrics.jsonl"
        while runs["cut"].poll() is None and not (rows.exists() and "grpo" in rows.read_text()):
            time.sleep(0.1)
        runs["cut"].send_signal(signal.SIGTERM)
        ended("cut", runs["cut"], 130)
        runs["cut"] = begun("cut")
        ended("one", runs["one"], 0)
        seconds = time.perf_counter() - began
        ended("two", runs["two"], 0)
        ended("cut", runs["cut"], 0)
    files = [tmp_path / name / "adapter" / models.ADAPTER for name in runs]
    one, two, cut = (
        torch.cat([v.flatten() for _, v in sorted(safetensors.torch.load_file(file).items())])
        for file in files
    )
    found = {"seconds": seconds, "apart": apart(two, one), "resumed_apart": apart(cut, one)}
    scores = read_json(tmp_path / "one" / "evaluation.json")
    found |= {f"domain after {s}": scores[s]["domain"]["value"] for s in ("base", "sft", "grpo")}
    figure("pocket, whole, three runs side by side", **found)
    assert found["apart"] or not found["resumed_apart"], "a resume alone makes another run"
    assert DEVICE == "cpu" or seconds < 300  # predicted: 90 to 130 s, alone


def test_benchmark(figure, tmp_path, monkeypatch):
    """Both forms of the command, short; the peak in a process of its own is one variant's."""
    measured, some = timing.peak_apart, {"one_pass", "grpo/penalty/2"}

    def of_one(words, options):
        return measured(words, options) if some & {*options} else 0

    monkeypatch.setattr(timing, "peak_apart", of_one)
    out, device = tmp_path / "figures.json", ["--set", f"model.device={DEVICE}"]
    plain = ["--capabilities", "2", "--rank", "8", "--rounds", "3"]
    assert benchmark.main([*device, *(PASSES if TINY else plain), "--out", str(out)]) == 0
    rows = {row["variant"]: row for row in read_json(out)["rows"]}
    figure("pocket, one pass in times of plain TRL's", backward=rows["one_pass"]["backward"],
           step=rows["one_pass"]["step"], peak_gb=rows["one_pass"]["peak_bytes"] / 1e9)  # fmt: skip
    assert benchmark.main([*device, *STEPS, "--out", str(out)]) == 0
    steps = {f"{r['stage']}, {r['rule']}": r["step"] for r in read_json(out)["rows"]}
    figure("pocket, steps with retention in times of those without", **steps)
    assert all(0 < ratio < 20 for ratio in steps.values())
