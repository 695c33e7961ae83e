"""What a run takes: bytes of weights, adapter, optimiser, gradients, activations, logits, KV cache.

Said before anything is loaded, so that a card too small is found in a second and not after an hour.
The arithmetic is of Llama-like decoders (Llama, Qwen2.5, SmolLM2, pocket); bbkit/README.md
compares it with peaks that were measured and that others published.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bbkit import CannotRun, InputError
from bbkit.machine import hub
from bbkit.prompts import LOGITS

if TYPE_CHECKING:
    from bbkit.config import Model as ModelSettings
    from bbkit.config import Settings

CGROUP = Path("/sys/fs/cgroup")  # where a container's memory limit is written
PROCESS = {"cpu": 0.75e9, "cuda": 0.6e9}  # Python with its libraries; a CUDA context
# Bytes for a logit while a loss is taken: itself, shifted, log-softmax, their gradients. Measured
# on a CPU (28.6 on pocket, 16 to 128 sequences, where the loss computes in float32 whatever the
# model); on a GPU what fits that which LLaMA-Factory's wiki states for LLaMA2-7B on 1,024 to 16,384
# tokens (tests/machine/test_memory.py).
LOGIT = {"cpu": 28, "cuda": 16}
# Dimensions as published on the Hub, for a plan without it: config.json of each model.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 24, 14, 2, 4864, 151936, True, 32768),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151936, True, 32768),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 152064, False, 32768),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (576, 30, 9, 3, 1536, 49152, True, 8192),
}
FIELDS = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
    "vocab_size tie_word_embeddings max_position_embeddings"
).split()


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Memory that is free on a device, within the limit of a container if there is one.

    >>> free_bytes() > 0
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no control group here, or no limit in it
        used = re.search(r"^anon (\d+)", (CGROUP / "memory.stat").read_text(), re.M)
        limit = int((CGROUP / "memory.max").read_text())
        free = min(free, max(0, limit - int(used[1] if used else 0)))
    return free


def forget_peak() -> None:
    """Begin `peak_bytes` anew: on the GPU, and in the process where the system can (Linux)."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most bytes in use since `forget_peak`: on the GPU where there is work on it, else resident.

    >>> peak_bytes() > 0
    True
    """
    if torch.cuda.is_initialized() and (most := torch.cuda.max_memory_allocated()):
        return most
    import resource  # not on Windows

    with contextlib.suppress(OSError, IndexError, ValueError):
        # Linux, whose rusage also counts the process that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split(maxsplit=1)[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def peak_gib() -> float:
    """`peak_bytes` as a run's manifest has it."""
    return round(peak_bytes() / 2**30, 2)


def measure(settings: ModelSettings, dtype: torch.dtype, offline: bool) -> tuple[Any, dict]:
    """Configuration and sizes of a model, before its weights are fetched."""
    path = hub.locate(settings.name, settings.revision, offline, ("config.json",))
    with hub.reading(settings.name):
        from transformers import AutoConfig

        folder, options = hub.source(path)
        found = AutoConfig.from_pretrained(folder, **options)
        return found, sizes(found, settings, dtype)


def _dimensions(settings: ModelSettings, dtype: torch.dtype, offline: bool) -> tuple[Any, dict]:
    """As `measure`, with the published dimensions where the model cannot be reached."""
    try:
        return measure(settings, dtype, offline)
    except InputError:
        if settings.name not in PUBLISHED:
            raise
    from transformers import AutoConfig

    family = "qwen2" if settings.name.startswith("Qwen/") else "llama"
    known = dict(zip(FIELDS, PUBLISHED[settings.name], strict=True))
    found = AutoConfig.for_model(family, **known)
    return found, sizes(found, settings, dtype)


def check_length(shape: Any, settings: ModelSettings) -> None:
    """InputError where a sequence may be longer than the model has positions."""
    room = getattr(shape, "max_position_embeddings", None) or settings.max_length
    if settings.max_length > room:
        raise InputError(f"model.max_length {settings.max_length}: the model has room for {room}")


def sizes(shape: Any, settings: ModelSettings, dtype: torch.dtype) -> dict[str, int]:
    """Numbers of weights and of LoRA weights, and the bytes of both with what training them adds.

    That is float32 LoRA weights, gradients and two Adam moments; activations are not counted.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(shape)
    head, targets = model.get_output_embeddings(), settings.lora_targets
    total, packed, lora = sum(p.numel() for p in model.parameters()), 0, 0
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            packed += layer.weight.numel() if settings.quantization == "nf4" else 0
            if "all-linear" in targets or name.rpartition(".")[2] in targets:
                lora += settings.lora_rank * (layer.in_features + layer.out_features)
    # NF4: half a byte, and an 8-bit scale for 64 weights with a float32 one for 256 scales
    weights = int((total - packed) * dtype.itemsize + packed * (1 / 2 + 1 / 64 + 1 / 4096))
    found = {"parameters": total, "lora_parameters": lora}
    return found | {"weight_bytes": weights, "training_bytes": weights + 16 * lora}


def plan(
    settings: Settings, dtype: torch.dtype, kind: str = "cpu", offline: bool = False
) -> dict[str, dict[str, int]]:
    """Bytes of each part at the peak of "sft" and of "grpo", on a device of `kind` cpu or cuda.

    "peak" is their sum, but for the KV cache, which is gone when gradients come: the larger counts.
    Without the Hub the published dimensions serve for the models of the presets.

    >>> from bbkit import config
    >>> found = plan(config.load("pocket"), torch.float32)["grpo"]
    >>> found["peak"] > found["activations"] > found["adapter"] > 0
    True
    """
    model, kept, s, g = settings.model, settings.retention, settings.sft, settings.grpo
    shape, found = _dimensions(model, dtype, offline)
    check_length(shape, model)
    lora, layers, hidden = found["lora_parameters"], shape.num_hidden_layers, shape.hidden_size
    # Kept for the backward pass, per token and layer: the inputs of the two norms, of the linear
    # maps with LoRA (that of q, k, v is one), q, k, v, and four widths of the feed-forward part.
    inside = (10 * hidden + 4 * shape.intermediate_size) * dtype.itemsize + 28 * model.lora_rank
    if kind == "cpu" and dtype.itemsize < 4:  # no autocast: each LoRA layer's input in float32 too
        inside += 4 * (6 * hidden + shape.intermediate_size)
    between = layers * hidden * dtype.itemsize
    saved = between + inside if model.gradient_checkpointing else layers * inside
    heads = shape.num_key_value_heads * (hidden // shape.num_attention_heads)
    cache = 2 * heads * layers * dtype.itemsize
    common = {"process": int(PROCESS[kind]), "weights": found["weight_bytes"], "adapter": 4 * lora}
    out = {}
    for stage, sequences, read, rows, filled in (
        ("sft", s.micro_batch_size, model.max_length, 0, 0),
        ("grpo", g.micro_batch_size, g.max_completion_length, len(g.rewards) + bool(g.beta),
         g.sample_at_once or g.prompts * g.generations),
    ):  # fmt: skip
        small = "8bit" in getattr(settings, stage).optimizer
        parts = common | {"optimiser": (2 if small else 8) * lora}
        activations = sequences * model.max_length * saved
        logits = sequences * read * shape.vocab_size
        if kept.rule != "none" and stage in kept.stages:
            # Its own passes come after, in parts of so many logits; a step's rule keeps where the
            # weights were, the row, the displacement and the metric beside the gradients.
            row = shape.vocab_size * (kept.max_new_tokens + 1)
            some = min(kept.per_step, max(1, LOGITS // row))
            tokens = some * min(2 * kept.max_new_tokens, model.max_length)
            parts["retention"] = 4 * lora * (1 if kept.rule == "penalty" else 6)
            activations, logits = max(activations, tokens * saved), max(logits, some * row)
        passing = {"gradients": 4 * lora * (1 + rows), "activations": activations}
        passing["logits"] = LOGIT[kind] * logits
        kv = filled * model.max_length * cache
        peak = sum(parts.values()) + max(sum(passing.values()), kv)
        out[stage] = parts | passing | {"kv_cache": kv, "peak": peak}
    return out


def check(
    settings: ModelSettings, sizes: dict, device: torch.device, say: Callable[[str], Any]
) -> None:
    """Refuse before loading: the system would otherwise kill the process without a word."""
    free, take = free_bytes(device), sizes["training_bytes"]
    if settings.name.endswith(".gguf"):
        take += 8 * sizes["parameters"]  # unpacked in one piece first
    line = f"{settings.name}, {sizes['parameters'] / 1e6:,.1f} M parameters, {take / 1e9:,.2f} GB"
    if take > free:
        mend = "take a smaller model" if settings.quantization == "nf4" else "set quantization: nf4"
        raise CannotRun(f"model {line}: {free / 1e9:,.2f} GB of {device} memory are free; {mend}")
    say(f"memory: {line} of {free / 1e9:,.2f} GB free, activations not counted")
