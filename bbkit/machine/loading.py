"""How a model is loaded here: backend, dtype, padding, what 4-bit weights need.

Serves every claim. Each choice is said with its reason; no code that comes with a model is run.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bbkit import CannotRun, InputError, prompts
from bbkit.machine import gpu, hub

if TYPE_CHECKING:  # at run time unsloth has to be imported before these
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bbkit.config import Model as ModelSettings

Say = Callable[[str], Any]
# Else it calls the Hub, and packs sequences into one row, where one pass (bbkit.gradients) cannot
# tell them apart.
UNSLOTH = dict.fromkeys(("UNSLOTH_GRPO_SEQ_PACKING", "UNSLOTH_GRPO_PREFIX_GROUPER"), "0")
UNSLOTH["UNSLOTH_DISABLE_STATISTICS"] = "1"
# On a CPU with AVX-512 BF16 it warns, when imported, of a kernel of the Hub's that it does without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
PADDINGS = ("<|endoftext|>", "<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<unk>")


def choose_backend(settings: ModelSettings, say: Say = print) -> str:
    """Say and return "unsloth" or "transformers"; may import unsloth, so call it before trl is."""
    obstacle = ""
    if settings.device == "cpu":
        obstacle = "unsloth needs a CUDA GPU and model.device is cpu"
    elif not torch.cuda.is_available():
        obstacle = f"unsloth needs a CUDA GPU: {gpu.obstacle()}"
    elif settings.name.endswith(".gguf"):
        obstacle = "unsloth does not train from a .gguf file"
    elif settings.backend != "transformers":
        for name, value in UNSLOTH.items():
            os.environ.setdefault(name, value)
        try:
            importlib.import_module("unsloth")
        except Exception as error:  # missing, or at odds with the stack in any of many ways
            obstacle = f"unsloth does not import ({hub.one_line(error)}); pip install -e '.[gpu]'"
    if settings.backend == "unsloth" and obstacle:
        raise CannotRun(f"model.backend unsloth: {obstacle}; or set model.backend: transformers")
    name = "transformers" if settings.backend == "transformers" or obstacle else "unsloth"
    auto = obstacle or "it is installed and there is a CUDA GPU"
    say(f"backend {name}: {auto if settings.backend == 'auto' else 'as set'}")
    return name


def choose_dtype(settings: ModelSettings, say: Say = print) -> tuple[torch.dtype, torch.device]:
    """Say and return the frozen weights' dtype and the device; LoRA weights are always float32."""
    name, reason = settings.dtype, "as set"
    cuda = settings.device != "cpu" and torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise CannotRun(f"model.device cuda: {gpu.obstacle()}; or set model.device: auto")
    if cuda:  # `accelerate launch` runs one process a GPU
        device, here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "this GPU"
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 emulates it, slowly
    else:
        device, here, able = torch.device("cpu"), "this CPU", torch.cpu.get_capabilities()
        bf16 = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    if name == "auto":
        name = "bfloat16" if bf16 else "float16" if cuda else "float32"
        reason = f"{here} {'computes in it' if bf16 else 'has no bfloat16'}"
    elif name == "float16" and not cuda:
        raise InputError("model.dtype float16: not to be trained on a CPU; set float32 or bfloat16")
    elif name == "bfloat16" and cuda and not bf16:
        raise CannotRun("model.dtype bfloat16: this GPU has none; set model.dtype: auto")
    say(f"dtype {name}: {reason}")
    return getattr(torch, name), device


def unsloth_arguments(settings: ModelSettings, path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of unsloth's from_pretrained; the defaults that could surprise are overruled."""
    four_bit = settings.quantization == "nf4"
    return {
        "model_name": str(path),
        "use_exact_model_name": True,  # else it swaps in its own quantised upload
        "max_seq_length": settings.max_length,
        "dtype": dtype,
        **{"load_in_4bit": four_bit, "load_in_8bit": False, "load_in_16bit": not four_bit},
        **{"full_finetuning": False, "fast_inference": False},
        "use_gradient_checkpointing": "unsloth" if settings.gradient_checkpointing else False,
        "max_lora_rank": settings.lora_rank,
        **{"trust_remote_code": False, "use_safetensors": True, "local_files_only": True},
    }


def fix_ending(tokenizer: PreTrainedTokenizerBase, say: Say = print) -> None:
    """Make the eos token the one with which the chat template closes a reply.

    Needed for gguf files, whose eos is read as <|im_start|>: no reply would ever end.
    Raises InputError where there is no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path}: no chat template; take an instruction model")
    end = prompts.closing(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        token = tokenizer.convert_ids_to_tokens(end)
        say(f"eos {token}: the chat template closes replies with it, not {tokenizer.eos_token}")
        tokenizer.eos_token = token


def fix_padding(tokenizer: PreTrainedTokenizerBase, say: Say = print) -> None:
    """Pad on the left (generation), with a token that is not eos: a masked eos is never learned."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        known = tokenizer.get_vocab()
        free = [t for t in PADDINGS if t in known and t != tokenizer.eos_token]
        if not free:
            raise InputError(f"{tokenizer.name_or_path}: no token to pad with but eos; add a <pad>")
        say(f"pad {free[0]}: padding with eos ({tokenizer.eos_token}) would hide it from the loss")
        tokenizer.pad_token = free[0]


def protect_4bit(model: torch.nn.Module) -> int:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-bf16; returns how many.

    It repacks in eval mode, and the backward passes after that are wrong without a word.
    """
    # by name: bitsandbytes need not be installed
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def badly_unpacked(model: torch.nn.Module) -> str:
    """Lengths of 4-bit rows that bitsandbytes does not give back on this device, such as "160".

    0.50.2 mixes up rows of 96 or 160 on an AVX512 CPU; normal weights come back to within 9 %.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    found = {(m.in_features, m.weight.device) for m in layers}
    wrong = []
    for length, device in sorted(found, key=str):
        rows = torch.randn(64, length, generator=torch.Generator().manual_seed(0)).to(device)
        back = dequantize_4bit(*quantize_4bit(rows, blocksize=64, quant_type="nf4"))
        if (back - rows).norm() > 0.15 * rows.norm():
            wrong.append(str(length))
    return ", ".join(wrong)


def _from_transformers(
    settings: ModelSettings, config: Any, path: Path, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
    quantization = BitsAndBytesConfig(**nf4) if settings.quantization == "nf4" else None
    source, options = hub.source(path)
    options |= {"config": config, "dtype": dtype}
    if path.suffix != ".gguf":
        options |= {"quantization_config": quantization, "device_map": {"": device}}
        return _read(AutoModelForCausalLM, source, use_safetensors=True, **options)
    # In two steps: transformers can neither quantise nor save what it has read from a gguf file.
    options["quantization_config"] = GgufConfig(dequantize=True)
    model = _read(AutoModelForCausalLM, source, **options)
    return rebuild(model, model.state_dict(), dtype, device, quantization)


def rebuild(
    model: Any, weights: Any, dtype: torch.dtype, device: torch.device, quantization: Any = None
) -> PreTrainedModel:
    """A new model of the same class and configuration, with these weights."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    options = {"dtype": dtype, "device_map": {"": device}, "quantization_config": quantization}
    return _read(type(model), None, config=config, state_dict=weights, **options)


def _read(kind: Any, source: Path | None, **options: Any) -> PreTrainedModel:
    model, report = kind.from_pretrained(source, output_loading_info=True, **options)
    wrong = sorted({*map(str, report["missing_keys"]), *map(str, report["mismatched_keys"])})
    if wrong:  # transformers would train on random numbers in their place, with a warning
        raise ValueError(f"{len(wrong)} weights are missing or misshapen, first {wrong[0]}")
    model.config._name_or_path = model.name_or_path = ""  # peft and trl look names up on the Hub
    return model
