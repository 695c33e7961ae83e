"""Settings of a run: default < preset < file < `--set key=value`, each value checked at its source.

Serves no claim. presets/*.yaml say what each key means; what unsloth changes unasked (optimiser,
rates, warm-up, masking, loss) is a key, so that settings mean the same with it and without.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bbkit import InputError
from bbkit.machine import functions
from bbkit.machine.files import read_yaml, yaml_tree, yaml_value

PRESETS = ("pocket", "smollm2-cpu", "t4", "24gb", "paper")  # presets/<name>.yaml, smallest first
Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Listed = BeforeValidator(lambda v: yaml_value(f"[{v.strip('[]')}]") if isinstance(v, str) else v)
Names = Annotated[tuple[str, ...], Listed]  # --set gives them as a,b or [a, b]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "sgd"]
Scheduler = Literal["constant", "constant_with_warmup", "linear", "cosine"]
Advantages = Literal["capability", "gdpo", "grpo", "dr_grpo"]
Combination = Literal["sum", "pcgrad", "mgda", "upgrad", "aligned_mtl", "dual_cone", "random"]
Metric = Literal["euclidean", "adam", "step"]
_ALIKE = dict.fromkeys(functions.REWARDS, 1.0)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, config={"extra": "forbid"})
class Model:
    name: str = "pocket"
    revision: str = ""
    quantization: Literal["nf4", "none"] = "none"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "transformers", "unsloth"] = "auto"
    max_length: Count = 512
    lora_rank: Count = 16
    lora_alpha: Positive = 32.0
    lora_dropout: Share = 0.0
    lora_targets: Names = LINEAR
    gradient_checkpointing: bool = False


@dataclass(frozen=True, config={"extra": "forbid"})
class Limits:
    sft: Whole = 0
    grpo: Whole = 0
    evaluate: Whole = 0


@dataclass(frozen=True, config={"extra": "forbid"})
class Columns:
    id: str = "id"
    question: str = "question"
    answer: str = "answer"
    options: Names = ("options",)
    reasoning: str = "reasoning"
    split: str = "split"


@dataclass(frozen=True, config={"extra": "forbid"})
class Data:
    sft: Names = ("ontology",)
    grpo: Names = ("ontology", "constraints")
    evaluate: Names = ("ontology", "constraints")
    columns: Columns = Columns()
    limits: Limits = Limits()
    allow_changed: bool = False


@dataclass(frozen=True, config={"extra": "forbid"})
class Sft:
    steps: Whole = 100
    batch_size: Count = 32
    micro_batch_size: Count = 32
    learning_rate: Share = 2e-4
    warmup_steps: Whole = 0
    weight_decay: Share = 0.0
    max_grad_norm: Positive = 1.0
    optimizer: Optimizer = "adamw_torch"
    scheduler: Scheduler = "linear"
    loss_type: Literal["nll", "chunked_nll", "dft"] = "nll"
    replay: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    averaging: Share = 0.0
    save_steps: Count = 50


@dataclass(frozen=True, config={"extra": "forbid"})
class Controller:
    rule: Literal["fixed", "deficit", "variance", "covariance", "agreement"] = "fixed"
    rate: Positive = 0.1
    ema: Share = 0.9
    target: Positive = 1.0
    floor: Share = 0.05  # below 1 over the number of rewards


@dataclass(frozen=True, config={"extra": "forbid"})
class Grpo:
    steps: Whole = 80
    prompts: Count = 32
    generations: Annotated[int, Field(ge=2)] = 8
    micro_batch_size: Count = 64
    max_completion_length: Count = 48
    sample_at_once: Whole = 0
    temperature: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    top_p: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    learning_rate: Share = 1e-5
    warmup_steps: Whole = 0
    weight_decay: Share = 0.0
    max_grad_norm: Positive = 1.0
    optimizer: Optimizer = "adamw_torch"
    scheduler: Scheduler = "constant"
    beta: Positive = 0.0
    epsilon: Share = 0.2
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    rewards: Annotated[Names, Field(min_length=1)] = functions.REWARDS
    weights: Mapping[str, Positive] = Field(default_factory=lambda: _ALIKE)  # by name; else 1
    judge: Share = 0.0
    controller: Controller = Controller()
    advantages: Advantages = "grpo"
    sigma_floor: Share = 0.1
    combination: Combination = "sum"
    metric: Metric = "euclidean"
    instruction_share: Share = 0.25
    updates_per_generation: Count = 1
    mask_truncated: bool = False
    save_steps: Count = 20


@dataclass(frozen=True, config={"extra": "forbid"})
class Retention:
    rule: Literal["none", "penalty", "step", "cone"] = "none"
    weight: Positive = 1.0
    budget: Positive = 0.01
    recovery: Share = 0.3
    prompts: Annotated[Names, Field(min_length=1)] = ("self",)
    replies: Count = 512
    per_step: Count = 8
    max_new_tokens: Count = 128
    stages: Annotated[tuple[Literal["sft", "grpo"], ...], Listed] = ("sft", "grpo")


@dataclass(frozen=True, config={"extra": "forbid"})
class Evaluation:
    questions: Whole = 0
    instructions: Whole = 0
    batch_tokens: Count = 12_000
    max_new_tokens: Count = 48
    ifeval: Whole = 0
    ifeval_tokens: Count = 512
    elsewhere: Whole = 0
    bootstrap: Count = 2000
    split: Literal["validation", "test"] = "test"


@dataclass(frozen=True, config={"extra": "forbid"})
class RunOptions:
    seed: Whole = 0
    threads: Whole = 0
    save_minutes: Whole = 10
    log_steps: Count = 1
    samples_per_log: Whole = 2
    report_to: Literal["none", "tensorboard", "trackio"] = "none"


@dataclass(frozen=True, config={"extra": "forbid"})
class Settings:
    """The resolved settings of one run; immutable, and equal when every key is equal."""

    model: Model = Model()
    data: Data = Data()
    sft: Sft = Sft()
    grpo: Grpo = Grpo()
    retention: Retention = Retention()
    evaluation: Evaluation = Evaluation()
    run: RunOptions = RunOptions()


def load(
    preset: str | None = None, file: str | Path | None = None, overrides: Iterable[str] = ()
) -> Settings:
    """Resolve settings: default < preset < file < overrides, the last one given winning.

    `overrides` are texts "key=value" with dotted keys and YAML values; a list may be given as a,b.
    Raises InputError (one line: source, key, what is expected, nearest match).

    >>> load("pocket", overrides=["grpo.steps=3", "sft.learning_rate=4e-3"]).grpo.steps
    3
    """
    settings = Settings()
    if preset is not None:
        if preset not in PRESETS:
            near = _nearest(preset, PRESETS)
            raise InputError(f"no preset {preset!r}{near} (presets: {', '.join(PRESETS)})")
        path = Path(__file__).parent / "presets" / f"{preset}.yaml"
        settings = _with(settings, read_yaml(path), f"preset {preset}")
    if file is not None:
        settings = _with(settings, read_yaml(Path(file)), str(file))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {text}: expected key=value, such as grpo.steps=100")
        value, said = value.strip(), f"--set {text}"
        given = yaml_tree(value, said) if value.startswith("{") else value  # keys of a section
        settings = _with(settings, {key.strip(): given or value}, said)
    return _checked(settings)


def to_dict(settings: Settings) -> dict[str, Any]:
    """Nested plain dict (lists, numbers, texts) that JSON and YAML can hold.

    >>> to_dict(Settings())["data"]["sft"]
    ['ontology']
    """
    return TypeAdapter(Settings).dump_python(settings, mode="json")


def from_dict(values: Mapping[str, Any], source: str = "settings") -> Settings:
    """Settings from what `to_dict` gave; missing keys take the default, others are checked.

    >>> from_dict(to_dict(Settings())) == Settings()
    True
    """
    return _checked(_with(Settings(), values, source))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one flat dict with dotted keys.

    >>> leaves({"grpo": {"weights": {"domain": 1.0}}})
    {'grpo.weights.domain': 1.0}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        flat |= leaves(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _nearest(word: str, known: Sequence[str]) -> str:
    near = [k for k in known if k.startswith(f"{word}.")][:3]  # a section
    near = near or [k for k in known if k.endswith(f".{word}")]  # "steps": of sft, of grpo
    near = near or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _with(settings: Settings, values: Mapping[str, Any], source: str) -> Settings:
    """A copy of the settings with `values`, nested or by dotted key, in their place."""
    tree = to_dict(settings)
    known = leaves(tree)
    for key, value in leaves(values).items():
        if key not in known and not key.startswith("grpo.weights."):  # names: see `_checked`
            raise InputError(f"{source}: unknown key {key}{_nearest(key, [*known])}")
        if isinstance(value, bool) and not isinstance(known.get(key), bool):
            raise InputError(f"{source}: {key} is no switch; it takes no {value}")
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[name] = value
    try:
        return TypeAdapter(Settings).validate_python(tree)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, wrong["loc"]))
        raise InputError(f"{source}: {key}: {wrong['msg']}, not {wrong['input']!r:.80}") from error


def _checked(s: Settings) -> Settings:
    """The same settings, after checks across keys, each a line that names them."""
    sft, g, batch, longest = s.sft, s.grpo, s.grpo.prompts * s.grpo.generations, s.model.max_length
    share = f"must be below 1/{len(g.rewards)}, the number of rewards"
    below, divide = "must be below model.max_length", "must divide prompts x generations"
    moments = f"grpo.metric=adam reads float moments, grpo.optimizer={g.optimizer} keeps none"
    idle = "scheduler=constant ignores warmup_steps: take constant_with_warmup, or 0 warmup steps"
    broken = (
        (sft.batch_size % sft.micro_batch_size, "sft.micro_batch_size must divide sft.batch_size"),
        (batch % g.micro_batch_size, f"grpo.micro_batch_size {divide}"),
        (g.controller.floor * len(g.rewards) >= 1, f"grpo.controller.floor {share}"),
        (g.judge and "reasoning" not in g.rewards, "grpo.judge is for the reward reasoning"),
        (g.metric == "adam" and "adamw_torch" not in g.optimizer, moments),
        (g.metric == "step" and g.combination != "dual_cone", "grpo.metric=step is for dual_cone"),
        (g.sample_at_once and batch % g.sample_at_once, f"grpo.sample_at_once {divide}"),
        (g.max_completion_length >= longest, f"grpo.max_completion_length {below}"),
        (s.evaluation.max_new_tokens >= longest, f"evaluation.max_new_tokens {below}"),
        (sft.scheduler == "constant" and sft.warmup_steps, f"sft.{idle}"),
        (g.scheduler == "constant" and g.warmup_steps, f"grpo.{idle}"),
    )
    lines = functions.faults(g.rewards, g.weights) + [line for wrong, line in broken if wrong]
    if lines:
        raise InputError(f"settings: {'; '.join(lines)}")
    return s
