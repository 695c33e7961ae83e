"""Settings of a run: default < preset < file < `--set key=value`, each value checked at its source.

Serves no claim by itself; it makes a run repeatable. What unsloth changes unasked (optimiser,
rates, warm-up, masking, loss) is a key here, so that settings mean the same with it and without.
"""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from bbkit.errors import InputError

PRESETS = ("pocket", "smollm2-cpu", "t4", "24gb", "paper")  # presets/<name>.yaml, smallest first
Count = Annotated[int, (1, None)]
Whole = Annotated[int, (0, None)]
Positive = Annotated[float, (0.0, None)]
Share = Annotated[float, (0.0, 1.0)]
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd"
]
Scheduler = Literal["constant", "constant_with_warmup", "linear", "cosine"]
Combination = Literal[
    "sum", "pcgrad", "mgda", "cagrad", "upgrad", "aligned_mtl", "dual_cone", "random"
]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


_MOVED = "; the section retention serves both stages now: set its rule, per_step and stages"
RENAMED = dict.fromkeys(("sft.retention", "grpo.retention"), _MOVED)


# What each key means stands beside it in every file of presets/.
@dataclass(frozen=True)
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
    lora_targets: tuple[str, ...] = LINEAR
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Limits:
    sft: Whole = 0
    grpo: Whole = 0
    evaluate: Whole = 0


@dataclass(frozen=True)
class Data:
    sft: tuple[str, ...] = ("ontology",)
    grpo: tuple[str, ...] = ("ontology", "constraints")
    evaluate: tuple[str, ...] = ("ontology", "constraints")
    limits: Limits = field(default_factory=Limits)
    allow_changed: bool = False


@dataclass(frozen=True)
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
    replay: Annotated[float, (0.0, 0.9)] = 0.0
    averaging: Share = 0.0
    save_steps: Count = 50


@dataclass(frozen=True)
class Weights:
    domain: Positive = 1.0
    reasoning: Positive = 1.0
    format: Positive = 1.0


@dataclass(frozen=True)
class Controller:
    rule: Literal["fixed", "deficit", "variance", "covariance", "agreement"] = "fixed"
    rate: Positive = 0.1
    ema: Share = 0.9
    target: Positive = 1.0
    floor: Share = 0.05


@dataclass(frozen=True)
class Grpo:
    steps: Whole = 80
    prompts: Count = 32
    generations: Annotated[int, (2, None)] = 8
    micro_batch_size: Count = 64
    max_completion_length: Count = 48
    sample_at_once: Whole = 0
    temperature: Annotated[float, (0.01, 10.0)] = 1.0
    top_p: Annotated[float, (0.01, 1.0)] = 1.0
    learning_rate: Share = 1e-5
    warmup_steps: Whole = 0
    weight_decay: Share = 0.0
    max_grad_norm: Positive = 1.0
    optimizer: Optimizer = "adamw_torch"
    scheduler: Scheduler = "constant"
    beta: Positive = 0.0
    epsilon: Share = 0.2
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    weights: Weights = field(default_factory=Weights)
    judge: Share = 0.0
    controller: Controller = field(default_factory=Controller)
    advantages: Literal["capability", "gdpo", "grpo", "dr_grpo"] = "grpo"
    sigma_floor: Share = 0.1
    combination: Combination = "sum"
    metric: Literal["euclidean", "adam", "step"] = "euclidean"
    instruction_share: Share = 0.25
    updates_per_generation: Count = 1
    mask_truncated: bool = False
    save_steps: Count = 20


@dataclass(frozen=True)
class Retention:
    rule: Literal["none", "penalty", "step", "cone"] = "none"
    weight: Positive = 1.0
    budget: Positive = 0.01
    recovery: Share = 0.3
    prompts: tuple[str, ...] = ("self",)
    replies: Count = 512
    per_step: Count = 8
    max_new_tokens: Count = 128
    stages: tuple[str, ...] = ("sft", "grpo")


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class RunOptions:
    seed: Whole = 0
    threads: Whole = 0
    save_minutes: Whole = 10
    log_steps: Count = 1
    samples_per_log: Whole = 2


@dataclass(frozen=True)
class Settings:
    """The resolved settings of one run; immutable, and equal when every key is equal.

    >>> Settings().grpo.generations
    8
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    sft: Sft = field(default_factory=Sft)
    grpo: Grpo = field(default_factory=Grpo)
    retention: Retention = field(default_factory=Retention)
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: RunOptions = field(default_factory=RunOptions)


def load(
    preset: str | None = None, file: str | Path | None = None, overrides: Iterable[str] = ()
) -> Settings:
    """Resolve settings: default < preset < file < overrides, the last one given winning.

    `overrides` are texts "key=value" with dotted keys and YAML values; a list may be given as a,b.
    Raises InputError (one line: source, key, what is expected, nearest match).

    >>> load("pocket", overrides=["grpo.steps=3", "sft.learning_rate=4e-3"]).grpo.steps
    3
    >>> load(overrides=["grpo.stepz=3"])
    Traceback (most recent call last):
    bbkit.errors.InputError: --set grpo.stepz=3: unknown key grpo.stepz; did you mean grpo.steps?
    """
    settings = Settings()
    if preset is not None:
        if preset not in PRESETS:
            known = f"(presets: {', '.join(PRESETS)})"
            raise InputError(f"no preset {preset!r}{_nearest(preset, PRESETS)} {known}")
        path = Path(__file__).parent / "presets" / f"{preset}.yaml"
        settings = _apply(settings, _read(path), f"preset {preset}")
    if file is not None:
        settings = _apply(settings, _read(Path(file)), str(file))
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {text}: expected key=value, such as grpo.steps=100")
        tree: Any = _Raw(raw.strip())
        for part in reversed(key.strip().split(".")):
            tree = {part: tree}
        settings = _apply(settings, tree, f"--set {text}")
    return _consistent(settings)


def choose_preset() -> tuple[str, str]:
    """The preset for this machine, and why, for printing; imports torch if it is installed."""
    if importlib.util.find_spec("torch") is None:
        return "pocket", "PyTorch is not installed"
    import torch

    from bbkit import gpu

    if why := gpu.obstacle():
        return "pocket", why
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    seen = f"{torch.cuda.get_device_name(0)} has {gib:.1f} GiB"
    for preset, least in (("24gb", 21), ("t4", 14)):  # a "24 GB" card reports 22 GiB or more
        if gib >= least:
            return preset, seen
    return "pocket", f"{seen}, less than the 14 GiB that preset t4 wants"


def to_dict(settings: Settings) -> dict[str, Any]:
    """Nested plain dict (lists, numbers, texts) that JSON and YAML can hold.

    >>> to_dict(Settings())["data"]["sft"]
    ['ontology']
    """
    plain = asdict(settings)
    for section in plain.values():
        section |= {k: list(v) for k, v in section.items() if isinstance(v, tuple)}
    return plain


def from_dict(values: Mapping[str, Any], source: str = "settings") -> Settings:
    """Settings from what `to_dict` gave; missing keys take the default, others are checked.

    >>> from_dict(to_dict(Settings())) == Settings()
    True
    """
    return _consistent(_apply(Settings(), values, source))


def to_yaml(settings: Settings) -> str:
    """The resolved settings as YAML, which `--config` reads back unchanged.

    >>> print(to_yaml(Settings()).splitlines()[1])
      name: pocket
    """
    return yaml.safe_dump(to_dict(settings), sort_keys=False, width=100)


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


class _Raw(str):
    """A value as typed on the command line: its meaning depends on the key's type."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML would drop the first without a word,
    and aliases, with which some lines can stand for gigabytes or for themselves."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in (key for key in keys if keys.count(key) > 1):
            twice = f"key {key} is given twice"
            raise yaml.constructor.ConstructorError(None, None, twice, node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    # ValueError: a date that does not exist; RecursionError: lists in lists in lists
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}, {getattr(error, 'problem', '')}" if mark else str(error)
        raise InputError(f"{source}: not valid YAML: {' '.join(line.split())}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = _yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path}: cannot read the configuration ({reason})") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections such as `grpo:` with keys below them")
    return tree


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    same = [k for k in known if k.rpartition(".")[2] == word]  # "steps": sft.steps or grpo.steps
    near = same or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _apply(section: Any, values: Mapping[str, Any], source: str, prefix: str = "") -> Any:
    """A copy of a settings section with `values` in place, each checked against its type."""
    hints, changes = get_type_hints(type(section), include_extras=True), {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            name = next(iter(leaves({name: value})), name)
            near = RENAMED.get(name) or _nearest(name, leaves(to_dict(Settings())))
            raise InputError(f"{source}: unknown key {name}{near}")
        if not is_dataclass(hints[key]):
            changes[key] = _checked(value, hints[key], source, name)
        elif isinstance(value, Mapping):
            changes[key] = _apply(getattr(section, key), value, source, f"{name}.")
        else:
            inner = ", ".join(list(get_type_hints(hints[key]))[:3])
            raise InputError(f"{source}: {name} is a section; set its keys, such as {inner}")
    return replace(section, **changes)


def _checked(value: Any, hint: Any, source: str, name: str) -> Any:
    """The value in the type of its key, or InputError."""
    kind, (low, high) = get_args(hint) if get_origin(hint) is Annotated else (hint, (None, None))
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    many, typed = get_origin(kind) is tuple, isinstance(value, _Raw)
    if typed and many and not value.startswith("["):
        value = [part.strip() for part in value.split(",") if part.strip()]
    elif typed:
        value = str(value) if choices or kind is str else _yaml(value, source)
    if kind is float and re.fullmatch(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", str(value)):
        value = float(value)  # YAML 1.1 reads 4e-3 as text
    if many:
        want = "a list of names, such as [a, b]"
        good = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    elif choices:
        want = f"one of {', '.join(choices)}{_nearest(str(value), choices)}"
        good = value in choices
    else:
        want = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        want += "" if low is None else f" of {low} or more" if high is None else f" {low} to {high}"
        good = type(value) is kind and (low is None or low <= value <= (high or 1e18))
    if not good:
        raise InputError(f"{source}: {name} takes {want}" + ("" if typed else f", not {value!r}"))
    return tuple(value) if many else value


def _consistent(s: Settings) -> Settings:
    """Checks across keys, each a line that names them."""
    sft, g, batch, longest = s.sft, s.grpo, s.grpo.prompts * s.grpo.generations, s.model.max_length
    below, unnamed = "must be below model.max_length", "names no data card: name one or set"
    idle = "scheduler=constant ignores warmup_steps: take constant_with_warmup, or 0 warmup steps"
    broken = (
        (sft.batch_size % sft.micro_batch_size, "sft.micro_batch_size must divide sft.batch_size"),
        (batch % g.micro_batch_size, "grpo.micro_batch_size must divide prompts x generations"),
        (sum(vars(g.weights).values()) == 0, "grpo.weights must not all be 0"),
        (
            g.metric == "adam" and not g.optimizer.startswith("adamw_torch"),
            f"grpo.metric=adam reads float second moments, grpo.optimizer={g.optimizer} keeps none",
        ),
        (
            g.metric == "step" and g.combination != "dual_cone",
            f"grpo.metric=step is the dual cone's: grpo.combination={g.combination}",
        ),
        (
            not {*s.retention.stages} <= {"sft", "grpo"},
            f"retention.stages={list(s.retention.stages)}: of sft and grpo",
        ),
        (
            (s.retention.rule != "none" or sft.replay) and not s.retention.prompts,
            "retention.prompts is empty: name data cards, a file, or self",
        ),
        (
            g.controller.floor * 3 >= 1,
            "grpo.controller.floor must be below 1/3: there are 3 rewards",
        ),
        (
            g.sample_at_once and batch % g.sample_at_once,
            "grpo.sample_at_once must divide prompts x generations",
        ),
        (g.max_completion_length >= longest, f"grpo.max_completion_length {below}"),
        (s.evaluation.max_new_tokens >= longest, f"evaluation.max_new_tokens {below}"),
        (sft.steps and not s.data.sft, f"data.sft {unnamed} sft.steps=0"),
        (sft.scheduler == "constant" and sft.warmup_steps, f"sft.{idle}"),
        (g.scheduler == "constant" and g.warmup_steps, f"grpo.{idle}"),
        (g.steps and not s.data.grpo, f"data.grpo {unnamed} grpo.steps=0"),
    )
    for wrong, line in broken:
        if wrong:
            raise InputError(f"settings: {line}")
    return s
