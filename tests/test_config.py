"""Settings: precedence, presets with the same commented keys, one clear line for each mistake."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bbkit import InputError, config
from bbkit.config import Columns, Settings, from_dict, leaves, load, to_dict
from bbkit.machine import gpu

FOLDER = Path(config.__file__).parent / "presets"
KEYS = list(leaves(to_dict(Settings())))


def preset_text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def message(**arguments) -> str:
    with pytest.raises(InputError) as caught:
        load(**arguments)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 250
    return text


def test_presets_are_the_files():
    assert sorted(config.PRESETS) == sorted(p.stem for p in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", config.PRESETS)
def test_presets_have_the_same_full_set_of_keys_in_the_same_order(name):
    assert list(leaves(yaml.safe_load(preset_text(name)))) == KEYS
    load(name)


@pytest.mark.parametrize("name", config.PRESETS)
def test_every_key_of_a_preset_is_commented(name):
    lines = preset_text(name).splitlines()
    assert lines[0].startswith("# ") and max(map(len, lines)) <= 100
    for before, line in pairwise(lines):
        if re.match(r"\s*\w+:", line):
            said = line.partition("  # ")[2] or before.strip().removeprefix("# ")
            assert len(said) > 3 and (before.strip().startswith("#") or "  # " in line), line


@pytest.mark.parametrize("name", config.PRESETS)
def test_hub_models_are_pinned_to_a_commit(name):
    model = load(name).model
    assert ("/" in model.name) == bool(re.fullmatch("[0-9a-f]{40}", model.revision))


def test_precedence(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("grpo:\n  prompts: 16\n  steps: 7\n")
    assert load().grpo.learning_rate == Settings().grpo.learning_rate
    preset = load("pocket").grpo
    assert preset.learning_rate != Settings().grpo.learning_rate
    grpo = load("pocket", file, ["grpo.steps=9", "grpo.steps=10"]).grpo
    assert (grpo.learning_rate, grpo.prompts, grpo.steps) == (preset.learning_rate, 16, 10)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("sft.learning_rate=4e-3", 0.004),
        ("sft.learning_rate=0", 0.0),
        ("grpo.weights.domain=2", 2.0),
        ("model.revision=0123456", "0123456"),  # YAML reads an octal number
        ("model.revision=12e45", "12e45"),
        ("model.name=no", "no"),
        ("model.revision=", ""),
        ("data.sft=ontology,medqa", ("ontology", "medqa")),
        ("data.sft=[ontology, medqa]", ("ontology", "medqa")),
        ("data.sft=ontology", ("ontology",)),
        ("data.allow_changed=true", True),
        (
            "data.columns={question: Frage, options: [A, B]}",
            Columns(question="Frage", options=("A", "B")),
        ),
        ("data.columns.options=A,B", ("A", "B")),
        ("model.quantization=none", "none"),
    ],
)
def test_values_take_the_type_of_their_key(text, value):
    found = load(overrides=[text])
    for part in text.partition("=")[0].split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grpo.stepz=3", ["unknown key grpo.stepz", "did you mean grpo.steps?"]),
        ("grop.steps=3", ["did you mean grpo.steps?"]),
        ("steps=3", ["did you mean sft.steps or grpo.steps?"]),
        ("grpo.steps.more=3", ["unknown key grpo.steps.more", "did you mean grpo.steps?"]),
        ("grpo=3", ["unknown key grpo; did you mean grpo.steps or grpo.prompts"]),
        ("grpo.steps", ["expected key=value"]),
        ("=3", ["expected key=value"]),
        ("grpo.steps=many", ["grpo.steps: ", "a valid integer", "not 'many'"]),
        ("grpo.steps=1.5", ["a valid integer"]),
        ("grpo.steps=true", ["a valid integer"]),
        ("grpo.steps=-1", ["greater than or equal to 0"]),
        ("grpo.steps=[", ["a valid integer"]),
        ("data.sft=[2001-13-45]", ["not valid YAML"]),
        ("data.sft={", ["not valid YAML"]),
        ("data.sft={}", ["data.sft.0: "]),
        ("data.columns={question: 1}", ["data.columns.question: ", "a valid string, not 1"]),
        ("data.columns={frage: a}", ["unknown key data.columns.frage"]),
        ("grpo.generations=1", ["greater than or equal to 2"]),
        ("grpo.learning_rate=nan", ["less than or equal to 1, not 'nan'"]),
        ("grpo.weights.domain=inf", ["a finite number"]),
        ("grpo.top_p=1.5", ["less than or equal to 1"]),
        ("model.quantization=nf8", ["model.quantization: ", "'nf4' or 'none'"]),
        ("data.allow_changed=maybe", ["a valid boolean"]),
        ("data.sft=[1, 2]", ["data.sft.0: ", "a valid string, not 1"]),
        ("grpo.micro_batch_size=7", ["must divide prompts x generations"]),
        ("sft.micro_batch_size=7", ["must divide sft.batch_size"]),
        ("grpo.controller.floor=0.4", ["grpo.controller.floor must be below 1/3"]),
        ("grpo.rewards=[]", ["grpo.rewards: ", "at least 1 item"]),
        ("grpo.rewards=[domain, fromat]", ["no reward 'fromat'; did you mean format?"]),
        ("grpo.rewards=my.py", ["no reward 'my.py'", "FILE.py:FUNCTION"]),
        ("grpo.rewards=a.py:f,b.py:f", ["two are called 'f'"]),
        ("grpo.rewards=format,a.py:format", ["two are called 'format'"]),
        ("grpo.weights.fromat=2", ["no reward 'fromat'; did you mean format?"]),
        ("grpo.weights.domain=true", ["grpo.weights.domain: ", "a valid number"]),
        ("grpo.weights.domain=-1", ["grpo.weights.domain: ", "greater than or equal to 0"]),
        ("grpo.weights=3", ["unknown key grpo.weights; did you mean grpo.weights.domain"]),
        ("sft.scheduler=constant", ["constant_with_warmup"]),
        ("grpo.max_completion_length=9999", ["model.max_length"]),
        ("retention.prompts=[]", ["retention.prompts: ", "at least 1 item"]),
        ("retention.stages=evaluate", ["'sft' or 'grpo'"]),
        ("grpo.metric=step", ["grpo.metric=step is for dual_cone"]),
    ],
)
def test_mistakes_on_the_command_line_are_one_clear_line(override, words):
    text = message(preset="pocket", overrides=[override])
    assert all(word in text for word in words), text
    assert text.startswith((f"--set {override}: ", "settings: "))


def test_weights_that_are_all_zero_are_refused():
    zero = [f"grpo.weights.{k}=0" for k in ("domain", "reasoning", "format")]
    assert "grpo.weights" in message(overrides=zero)
    load(overrides=zero[:2])


def test_weights_go_by_the_names_of_the_rewards_in_any_order():
    asked = ["grpo.weights.brevity=2", "grpo.rewards=[format, my_rewards.py:brevity]"]
    grpo = load("pocket", overrides=asked).grpo
    assert grpo.rewards == ("format", "my_rewards.py:brevity") and grpo.weights["brevity"] == 2
    assert from_dict(to_dict(load("pocket", overrides=asked))).grpo == grpo
    near = message(preset="pocket", overrides=["grpo.weights.brevty=2", asked[1]])
    assert "no reward 'brevty'; did you mean brevity?" in near
    off = ["grpo.rewards=domain", "grpo.weights.domain=0"]
    assert "must not all be 0: domain" in message(overrides=off)
    judged = ["grpo.rewards=domain", "grpo.judge=0.5"]
    assert "grpo.judge is for the reward reasoning" in message(overrides=judged)


def test_the_floor_fits_the_number_of_rewards():
    eight = "grpo.rewards=[{}]".format(", ".join(f"a.py:r{i}" for i in range(8)))
    assert "floor must be below 1/8" in message(overrides=[eight, "grpo.controller.floor=0.125"])
    load(overrides=[eight, "grpo.controller.floor=0.12"])
    load(overrides=["grpo.rewards=domain", "grpo.controller.floor=0.9"])


def test_unknown_preset_names_the_nearest():
    text = message(preset="pockt")
    assert "did you mean pocket?" in text and "24gb" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("grpo:\n  stepz: 3\n", "did you mean grpo.steps?"),
        (
            "grpo:\n  steps: three\n",
            "a valid integer, unable to parse string as an integer, not 'three'",
        ),
        ("grpo:\n", "did you mean grpo.steps or"),
        ("grpo: [1]\n", "did you mean grpo.steps or"),
        ("- 1\n", "expected sections"),
        ("", "expected sections"),
        ("grpo: {\n", "not valid YAML"),
        ("grpo:\n  steps: 3\ngrpo:\n  prompts: 3\n", "key grpo is given twice"),
        ("grpo: !!python/object:os.system {}\n", "not valid YAML"),
        ("model:\n  revision: 12\n", "model.revision: Input should be a valid string, not 12"),
        ("data:\n  sft: 3\n", "data.sft: "),
        ("grpo:\n  steps: true\n", "grpo.steps is no switch; it takes no True"),
        ("sft:\n  averaging: yes\n", "sft.averaging is no switch"),
        ("3: 4\n", "unknown key 3"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path, content, words):
    file = tmp_path / "my.yaml"
    file.write_text(content)
    text = message(file=file)
    assert text.startswith(f"{file}: ") and words in text, text


def test_unreadable_files_are_named(tmp_path):
    assert "No such file" in message(file=tmp_path / "none.yaml")
    assert "Is a directory" in message(file=tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "utf-8" in message(file=tmp_path / "binary")


@pytest.mark.parametrize("name", config.PRESETS)
def test_dict_and_yaml_round_trip(tmp_path, name):
    found = load(name)
    assert from_dict(to_dict(found)) == found
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(to_dict(found)))
    assert load(file=tmp_path / "same.yaml") == found


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(0, 10**6))
def test_any_number_survives_the_command_line_and_yaml(rate, steps):
    found = load(overrides=[f"sft.learning_rate={rate}", f"sft.steps={steps}"])
    assert (found.sft.learning_rate, found.sft.steps) == (rate, steps)
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(found)))) == found


@settings(deadline=None)
@given(st.text(max_size=30))
def test_no_override_can_raise_anything_else(text):
    for override in (text, f"grpo.{text}", f"grpo.steps={text}", f"data.sft={text}"):
        try:
            load(overrides=[override])
        except InputError as error:
            assert str(error)


def test_importing_config_and_record_imports_no_torch():
    code = "import sys; from bbkit.runs import plots, record; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class FakeCuda:
    """Stands for torch.cuda with one GPU of so many GiB (0: none)."""

    def __init__(self, gib: float) -> None:
        self.total_memory = gib * 2**30

    def is_available(self) -> bool:
        return self.total_memory > 0

    def get_device_properties(self, index: int) -> "FakeCuda":
        return self

    def get_device_name(self, index: int) -> str:
        return "Some GPU"


@pytest.mark.parametrize(
    ("gib", "preset"), [(0, "pocket"), (8, "pocket"), (14.6, "t4"), (22, "24gb"), (79, "24gb")]
)
def test_preset_is_chosen_by_gpu_memory(monkeypatch, gib, preset):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(torch, "cuda", FakeCuda(gib))
    name, reason = gpu.choose_preset()
    assert name == preset and ("Some GPU" in reason) == (gib > 0)


@pytest.mark.parametrize(
    ("built", "smi", "said"),
    [
        ("13.0", "echo Tesla T4, 470.82.01", "Tesla T4 with driver 470.82.01 is here, .* too old"),
        ("13.0", "echo Tesla T4, 470.82.01", "cannot use it .*update the driver, or install"),
        (None, "echo Tesla T4, 580.95.05", "Tesla T4 .* is built without CUDA; install one"),
        ("13.0", "exit 9", "^no CUDA GPU is visible$"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_from_none(monkeypatch, tmp_path, built, smi, said):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found 11040). Update it.")

    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{smi}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    name, reason = gpu.choose_preset()
    assert name == "pocket" and re.search(said, reason), reason
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpu.choose_preset()[1] == "CUDA_VISIBLE_DEVICES=-1 hides every GPU"


def test_a_section_takes_no_keyword_that_it_does_not_know():
    with pytest.raises(ValueError, match="nmae"):
        config.Model(nmae="pocket")
