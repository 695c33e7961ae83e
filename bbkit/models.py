"""Base model and adapter: load, save, merge.

Serves every claim: QLoRA on NF4 weights, by unsloth on CUDA and by transformers, peft and
bitsandbytes elsewhere, the CPU included; the paper names neither loader nor quantisation. Base and
tuned model are one set of frozen weights with the adapter off or on. LoRA weights are float32
whatever the base, and files are read strictly, since PEFT does not. bbkit.machine.loading says how.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from bbkit import InputError
from bbkit.machine import cpu, files, hub, loading, memory

if TYPE_CHECKING:  # at run time unsloth has to be imported before these
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from bbkit.config import Model as ModelSettings


ADAPTER = "adapter_model.safetensors"


def load(
    settings: ModelSettings, say: loading.Say = print, offline: bool = False
) -> tuple[Any, Any]:
    """The base model (frozen, in eval mode, without adapter) and its tokenizer.

    `model.origin` tells what was loaded and how, for the manifest of a run.
    Raises InputError for a model that is missing, corrupt or not to be had offline, CannotRun for
    one that does not fit into the memory here or needs a package that is not installed.
    """
    backend = loading.choose_backend(settings, say)  # first of all: it may import unsloth
    dtype, device = loading.choose_dtype(settings, say)
    config, sizes = memory.measure(settings, dtype, offline)
    memory.check_length(config, settings)
    memory.check(settings, sizes, device, say)
    path = hub.locate(settings.name, settings.revision, offline)
    with hub.reading(settings.name):
        hub.refuse_pickles(path)
        if backend == "unsloth":
            from unsloth import FastLanguageModel

            model, _ = FastLanguageModel.from_pretrained(
                **loading.unsloth_arguments(settings, path, dtype)
            )
        else:
            model = loading._from_transformers(settings, config, path, dtype, device)
        from transformers import AutoTokenizer, GenerationConfig

        folder, options = hub.source(path)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        tokenizer.clean_up_tokenization_spaces = False
        loading.fix_ending(tokenizer, say)
    loading.fix_padding(tokenizer, say)
    uses = model.config._attn_implementation
    kernels = "PyTorch's own, for any GPU and dtype" if uses == "sdpa" else f"{backend} chose it"
    say(f"attention {uses}: {kernels}")
    # No defaults of the model's own, such as Qwen's repetition penalty: greedy unless told.
    tokens = {f"{t}_token_id": getattr(tokenizer, f"{t}_token_id") for t in ("bos", "eos", "pad")}
    model.config.update(tokens)
    model.generation_config = GenerationConfig(**tokens)
    if loading.protect_4bit(model) and (wrong := loading.badly_unpacked(model)):
        say(f"nf4: bitsandbytes unpacks rows of {wrong} weights wrongly here; set it to none")
    model.requires_grad_(False)
    if device.type == "cpu":
        cpu.quicken(model)
    model.bbkit_settings = settings
    commit = path.name if path.parent.name == "snapshots" else None
    model.origin = {"name": settings.name, "revision": commit, "backend": backend, **sizes}
    model.origin |= {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    model.origin |= {"quantization": settings.quantization}
    return model.eval(), tokenizer


def add_lora(model: PreTrainedModel, settings: ModelSettings, seed: int) -> PeftModel:
    """Wrap the base model in fresh LoRA matrices (B is 0), the same for the same seed."""
    from peft import LoraConfig

    every = "all-linear" in settings.lora_targets
    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if every else list(settings.lora_targets),
        task_type="CAUSAL_LM",
    )
    try:
        return _wrap(model, lora, seed)
    except ValueError as error:
        raise InputError(f"model.lora_targets: {hub.one_line(error)}") from error


@contextlib.contextmanager
def keep_float32(model: torch.nn.Module) -> Iterator[None]:
    """Build TRL trainers inside: they cast the LoRA weights of a 4-bit model to bfloat16.

    A step of 1e-5 vanishes in that, and a T4 cannot compute in it. The weights come back bit-equal.
    """
    kept = [(p, p.data) for p in model.parameters() if p.requires_grad]
    yield
    for parameter, data in kept:
        parameter.data = data


def load_adapter(model: Any, folder: str | Path, trainable: bool = True) -> PeftModel:
    """Put a saved adapter on a base model, or into the LoRA matrices that it already has.

    Strict, since PEFT is not: each tensor of the file has its place and each place is filled, or
    InputError names the file. `with model.disable_adapter():` gives the base model back.
    """
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    file = Path(folder) / ADAPTER
    if not file.is_file() or not file.with_name("adapter_config.json").is_file():
        raise InputError(f"{folder}: no adapter here ({ADAPTER} and adapter_config.json)")
    fresh = not isinstance(model, PeftModel)
    try:
        lora = LoraConfig.from_pretrained(str(folder))
        if not isinstance(lora, LoraConfig):
            raise TypeError("not a LoRA adapter")
        lora.base_model_name_or_path = None
        saved = safetensors.torch.load_file(file)
        wrapped = _wrap(model, lora, seed=0) if fresh else model
        places = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        own = wrapped.peft_config["default"]
    except Exception as error:  # whatever bad JSON, wrong types or a cut file bring about
        raise InputError(
            f"{file}: corrupt adapter or configuration: {hub.one_line(error)}"
        ) from error
    wrong = sorted(saved.keys() ^ places.keys())
    wrong = wrong or [k for k, v in saved.items() if v.shape != places[k].shape]
    wrong = wrong or [k for k, v in saved.items() if not v.isfinite().all()]
    wrong = wrong or [k for k in ("r", "lora_alpha") if getattr(lora, k) != getattr(own, k)]
    if wrong:
        if fresh:
            wrapped.unload()
        what = f"{len(wrong)} entries do not fit this model or are not finite, first {wrong[0]}"
        raise InputError(f"{file}: {what}; save the adapter anew")
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(saved[key])
    for name, parameter in wrapped.named_parameters():  # ".ref." is TRL's, for the KL penalty
        parameter.requires_grad_(trainable and ".lora_" in name and ".default." in name)
    return wrapped


def save_adapter(model: PeftModel, folder: str | Path) -> Path:
    """Write the adapter (safetensors and adapter_config.json, as PEFT reads them), whole or not."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)  # True asks the Hub
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    config = model.peft_config["default"].to_dict()
    name = getattr(model, "origin", {}).get("name")
    config |= {"base_model_name_or_path": name, "inference_mode": True}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ordered = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    files.write_json(folder / "adapter_config.json", ordered)
    files.write_bytes(folder / ADAPTER, safetensors.torch.save(tensors, {"format": "pt"}))
    return folder


def average_with_base(model: PeftModel, share: float) -> None:
    """Move a tuned model `share` of the way back to its base (WiSE-FT, arXiv 2109.01903).

    The average of the two models' weights is exact: ΔW is linear in B.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B.default." in name:
                parameter.mul_(1 - share)


def merge(model: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A plain copy of the model in `dtype`: 4-bit weights unpacked, the adapter added in.

    On the CPU whatever the model's device, map by map: a card has no room for all of it unpacked.
    """
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tuned = {p: m for p, m in base.named_modules() if hasattr(m, "get_delta_weight")}
    weights: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}  # of weights that have two places
    for path, module in base.named_modules():
        place = path.removesuffix(".base_layer")
        for key, value in module.named_parameters(recurse=False) if ".lora_" not in path else ():
            if id(value) not in copies:
                whole = dequantize_bnb_weight(value).detach()
                if key == "weight" and place != path:
                    whole = whole.to(torch.float32, copy=True)
                    whole += tuned[place].get_delta_weight("default").detach()
                copies[id(value)] = whole.to("cpu", dtype, copy=True)
            weights[f"{place}.{key}"] = copies[id(value)]
    with hub.reading("to merge"):
        return loading.rebuild(base, weights, dtype, torch.device("cpu"))


def unsloth_lora_arguments(settings: ModelSettings, lora: LoraConfig, seed: int) -> dict[str, Any]:
    """Arguments of unsloth's get_peft_model for the adapter that `lora` describes."""
    targets = lora.target_modules
    return {
        **{"r": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout},
        "target_modules": targets if isinstance(targets, str) else sorted(targets or ()),
        "bias": "none",
        "use_gradient_checkpointing": "unsloth" if settings.gradient_checkpointing else False,
        "max_seq_length": settings.max_length,
        "random_state": seed,
    }


def _wrap(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    settings: Any = getattr(model, "bbkit_settings", None)
    if getattr(model, "origin", {}).get("backend") == "unsloth":
        from unsloth import FastLanguageModel

        arguments = unsloth_lora_arguments(settings, lora, seed)
        wrapped = FastLanguageModel.get_peft_model(model, **arguments)
    else:
        from peft import get_peft_model

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = get_peft_model(model, lora)  # LoRA in float32, whatever the base
        if settings and settings.gradient_checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    loading.protect_4bit(wrapped)
    return wrapped
