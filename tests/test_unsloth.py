"""What the kit relies on in the pinned unsloth, read from its source: there is no GPU to run it on.

Each entry of RELIED says what must be there and why. The pin is the one of pyproject's `gpu`. The
slow test takes unsloth's rewritten GRPO trainer through two steps on the CPU, beside TRL's own.
"""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, SFTConfig

from bbkit import config, models, sft
from bbkit.machine import loading

LOADER, LLAMA = "unsloth/models/loader.py", "unsloth/models/llama.py"
RL, PATCHES = "unsloth/models/rl.py", "unsloth/models/rl_replacements.py"
# (file, text that must be in it, why)
RELIED = [
    (
        PATCHES,
        'if function_name != "compute_loss"',
        "compute_loss is replaced as a whole, so super().compute_loss is unsloth's",
    ),
    (PATCHES, 'advantages = inputs["advantages"]', "the loss weighs by what we put there"),
    (
        PATCHES,
        "rewards_per_func = self._calculate_rewards(inputs, prompts",
        "rewards are asked of the method that capability_aware overrides",
    ),
    (
        LLAMA,
        "def _decline_fused_lora_for_fsdp(model, reason = None) -> int:",
        "puts PEFT's forwards back, so that one pass serves",
    ),
    (PATCHES, "B = self.args.unsloth_grpo_mini_batch", "1: a micro-batch stays whole"),
    (PATCHES, 'os.environ.get("UNSLOTH_GRPO_SEQ_PACKING", "1")', "0: a row for each sequence"),
    (PATCHES, 'os.environ.get("UNSLOTH_GRPO_PREFIX_GROUPER", "1")', "0: with its prompt"),
    (RL, "original_training_step(self, model, *args, **kwargs)", "training_step is kept"),
    (
        LLAMA,
        "(lora_dropout == 0 or _fast_lora.FUSED_LORA_DROPOUT)",
        "dropout 0 turns the fused LoRA path on, which bypasses the LoRA modules: unfuse",
    ),
    (LLAMA, 'and bias == "none"', "the other condition of the fused path"),
    (LOADER, 'kwargs.get("local_files_only", False)', "nothing is fetched behind our back"),
    (RL, '"loss_type": "nll"', "SFT's loss is the plain one, as we set it"),
    (RL, "if epsilon_high is None:", "with dapo it would be 0.28; the kit says what it is"),
]
# Fields that unsloth changes and that no run of ours reads, with the reason.
IDLE = {
    "per_device_eval_batch_size": "no evaluation inside the trainer",
    "eval_accumulation_steps": "no evaluation inside the trainer",
    "include_tokens_per_second": "a log entry",
    "include_num_input_tokens_seen": "a log entry",
    "vllm_mode": "no vLLM",
    "vllm_importance_sampling_correction": "no vLLM",
    "generation_kwargs": "empty in TRL too",
    "router_aux_loss_coef": "no model of ours has a router",
    "padding_free": "off in TRL too unless set",
    "max_seq_length": "not TRL's name; the model has it",
}


def pinned() -> list[str]:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["gpu"]
    return [line for line in extra if line.startswith("unsloth==")]


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """The pinned unsloth, unpacked and not installed; skips where the index is out of reach."""
    folder = tmp_path_factory.mktemp("unsloth")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, *pinned()], capture_output=True, text=True, timeout=300)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"cannot download {pinned()[0]}: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder, [n for n in wheel.namelist() if n.startswith("unsloth/models/")])
    return folder


def parameters(path: Path, function: str, owner: str) -> set[str]:
    """Names that a method of a class takes."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == function:
                    return {a.arg for a in (*method.args.args, *method.args.kwonlyargs)}
    return set()


def changed_defaults(path: Path) -> set[str]:
    """Keys of every `replacements = {...}` in rl.py: the arguments that unsloth gives anew."""
    keys: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        if [getattr(t, "id", "") for t in node.targets] == ["replacements"]:
            keys |= {k.value for k in node.value.keys if isinstance(k, ast.Constant)}
    return keys


def given() -> set[str]:
    """Fields that the kit sets for both trainers, and for GRPO in bbkit/grpo.py."""
    settings = config.load("t4")
    names = set(sft.arguments(settings.grpo, settings, Path("x"))) | {"bf16", "fp16"}
    for module in ("grpo.py", "sft.py"):
        tree = ast.parse((Path(sft.__file__).parent / module).read_text())
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in (
                "GRPOConfig", "SFTConfig",
            ):  # fmt: skip
                names |= {k.arg for k in call.keywords if k.arg}
    return names


def broken(folder: Path) -> list[str]:
    """What of the contract does not hold for the unsloth in a folder."""
    found = [
        f"{file}: {text!r} is gone ({why})"
        for file, text, why in RELIED
        if text not in (folder / file).read_text(encoding="utf-8")
    ]
    settings = config.load("t4").model
    asked = loading.unsloth_arguments(settings, Path("model"), torch.float16)
    through = {"use_safetensors", "local_files_only"}  # by **kwargs to transformers
    known = parameters(folder / LOADER, "from_pretrained", "FastLanguageModel")
    found += [f"from_pretrained takes no {k}" for k in asked if k not in known | through]
    lora = models.unsloth_lora_arguments(settings, LoraConfig(target_modules=["q_proj"]), 0)
    known = parameters(folder / LLAMA, "get_peft_model", "FastLlamaModel")
    found += [f"get_peft_model takes no {k}" for k in lora if k not in known]
    fields = {f.name for made in (GRPOConfig, SFTConfig) for f in dataclasses.fields(made)}
    changed = changed_defaults(folder / RL)
    if not {"learning_rate", "loss_type", "optim"} <= changed:
        found.append("rl.py: the table of changed defaults is not found")
    left = (changed & fields) - given() - set(IDLE)
    return found + [f"unsloth changes {k}, which the kit leaves to the default" for k in left]


def test_the_pinned_unsloth_is_as_relied_on(source):
    assert broken(source) == []


def test_rewards_are_patched_nowhere_else(source):
    text = (source / PATCHES).read_text(encoding="utf-8")
    assert '!= "_calculate_rewards"' not in text and "def _calculate_rewards" not in text


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [(file, text, re.sub("[a-z_]{4,}", "renamed", text, count=1)) for file, text, _ in RELIED]
    + [
        (LOADER, "use_exact_model_name = False", "exact_name = False"),
        (LLAMA, "random_state = 3407", "seed = 3407"),
        (RL, '"torch_empty_cache_steps": 250', '"max_completion_length": 8, "max_steps": 8'),
        (RL, '"optim": "adamw_8bit",', '"epsilon_high": 0.3,'),
    ],
)
def test_a_renamed_name_is_noticed(source, tmp_path, file, old, new):
    copy = tmp_path / "copy"
    for name in (LOADER, LLAMA, RL, PATCHES):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, copy / name)
    text = (copy / file).read_text(encoding="utf-8")
    assert old in text
    (copy / file).write_text(text.replace(old, new), encoding="utf-8")
    if '"torch_empty_cache_steps"' in old:  # fields that the kit sets: no harm
        assert broken(copy) == []
    else:
        assert broken(copy)


TWO_STEPS = """
import json, sys, tempfile
from pathlib import Path
if sys.argv[1] == "unsloth":
    import unsloth
    from unsloth.models import rl  # asked by hand: UNSLOTH_ALLOW_CPU leaves TRL as it is
    for name in ("grpo_trainer", "sft_trainer"):
        rl._patch_trl_rl_trainers(name)
from bbkit import models, config, grpo, sft, train
settings = config.load("pocket", None, [
    "sft.steps=12", "sft.batch_size=16", "sft.micro_batch_size=16", "grpo.steps=2",
    "grpo.prompts=4", "grpo.generations=4", "grpo.micro_batch_size=8", "run.threads=1",
    "grpo.advantages=capability", "grpo.combination=dual_cone", "grpo.judge=0.5",
    "retention.rule=none"])
rows = train.load_rows(settings, None)
model, tokenizer = models.load(settings.model)
model = models.add_lora(model, settings.model, 0)
model.for_training = lambda *_, **__: model.train()  # as FastLanguageModel's models have them
model.for_inference = lambda *_, **__: model.eval()
asked, general = ([rows["grpo"][i] for i in part] for part in train.axes(rows["grpo"]))
order = grpo.schedule(asked, general, 2, 4, 0.25, 0)
with tempfile.TemporaryDirectory() as folder:
    sft.build(model, tokenizer, rows["sft"], settings, Path(folder, "sft")).train()
    trainer = grpo.build(model, tokenizer, order, settings, Path(folder, "grpo"))
    trainer.train()
log = [row for row in trainer.state.log_history if "loss" in row]
found = {"engine": trainer.gradient_engine, "log": log}
found["classes"] = [kind.__name__ for kind in type(trainer).__mro__]
Path(sys.argv[2]).write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_steps_on_unsloths_rewritten_trainer_are_those_on_trls_own(tmp_path):
    """SFT, then GRPO with a gradient per capability; the model is transformers', the trainers not.

    One pass serves there as well, since the kit has unsloth's loss leave a micro-batch whole
    (unsloth_grpo_mini_batch) and its sequences apart (loading.UNSLOTH). What a CPU does not show:
    fused LoRA kernels, which gradients.unfuse takes away.
    """
    zoo = [name.replace("unsloth==", "unsloth_zoo==") for name in pinned()]
    others = ["triton", "cut_cross_entropy", "tyro", "hf_transfer", "msgspec"]
    packages = tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
    done = subprocess.run([*command, *pinned(), *zoo, *others], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot install unsloth: {done.stderr.strip()[-200:]}")
    found = {}
    for kind in ("trl", "unsloth"):
        paths = [str(packages)] if kind == "unsloth" else []
        switches = ("UNSLOTH_ALLOW_CPU", "UNSLOTH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
        environment = {**os.environ, **dict.fromkeys(switches, "1")}
        environment |= loading.UNSLOTH
        root = str(Path(sft.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([root, *paths])
        out = tmp_path / f"{kind}.json"
        run = subprocess.run(
            [sys.executable, "-c", TWO_STEPS, kind, str(out)], cwd=tmp_path, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-2000:]
        assert "we will set it" not in run.stdout, "unsloth changed a field that the kit left open"
        found[kind] = json.loads(out.read_text())
    assert "UnslothGRPOTrainer" in found["unsloth"]["classes"]
    assert [found[kind]["engine"] for kind in ("trl", "unsloth")] == ["one_pass", "one_pass"]
    names = [k for k in found["trl"]["log"][0] if k.startswith(("gradient_norm/", "reward", "sig"))]
    for ours, theirs in zip(found["trl"]["log"], found["unsloth"]["log"], strict=True):
        for name in (*names, "loss"):
            assert theirs[name] == pytest.approx(ours[name], rel=0.01, abs=1e-3), name
