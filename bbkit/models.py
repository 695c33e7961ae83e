"""Base model and tokenizer, through one loader; bbkit.adapters puts LoRA on it.

Serves every claim: QLoRA on NF4 weights, by unsloth on CUDA and by transformers, peft and
bitsandbytes elsewhere, the CPU included. The paper names neither loader nor quantisation.
Only safetensors and gguf weights are read, and no code that comes with a model is run.
Each choice made here is said with its reason.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib.util
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bbkit import files
from bbkit.config import CannotRun, InputError

if TYPE_CHECKING:  # at run time unsloth has to be imported before these
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bbkit.config import Model as ModelSettings

Say = Callable[[str], Any]
POCKET = Path(__file__).parent / "pocket"
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # of a Hub model; no pickles
PADDINGS = ("<|endoftext|>", "<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<unk>")
CGROUP = Path("/sys/fs/cgroup")  # where a container's memory limit is written


def load(settings: ModelSettings, say: Say = print, offline: bool = False) -> tuple[Any, Any]:
    """The base model (frozen, in eval mode, without adapter) and its tokenizer.

    `model.origin` tells what was loaded and how, for the manifest of a run.
    Raises InputError for a model that is missing, corrupt or not to be had offline, CannotRun for
    one that does not fit into the memory here or needs a package that is not installed.
    """
    backend = choose_backend(settings, say)  # first of all: it may import unsloth
    dtype, device = choose_dtype(settings, say)
    config, sizes = _measure(settings, dtype, offline)
    _check_memory(settings, sizes, device, say)
    path = locate(settings.name, settings.revision, offline)
    with reading(settings.name):
        _refuse_pickles(path)
        if backend == "unsloth":
            from unsloth import FastLanguageModel

            model, _ = FastLanguageModel.from_pretrained(**unsloth_arguments(settings, path, dtype))
        else:
            model = _from_transformers(settings, config, path, dtype, device)
        from transformers import AutoTokenizer, GenerationConfig

        folder, options = _source(path)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        tokenizer.clean_up_tokenization_spaces = False
        fix_ending(tokenizer, say)
    fix_padding(tokenizer, say)
    # No defaults of the model's own, such as Qwen's repetition penalty: greedy unless told.
    tokens = {f"{t}_token_id": getattr(tokenizer, f"{t}_token_id") for t in ("bos", "eos", "pad")}
    model.config.update(tokens)
    model.generation_config = GenerationConfig(**tokens)
    protect_4bit(model)
    model.requires_grad_(False)
    model.bbkit_settings = settings
    commit = path.name if path.parent.name == "snapshots" else None
    model.origin = {"name": settings.name, "revision": commit, "backend": backend, **sizes}
    model.origin |= {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    model.origin |= {"quantization": settings.quantization}
    return model.eval(), tokenizer


def choose_backend(settings: ModelSettings, say: Say = print) -> str:
    """Say and return "unsloth" or "transformers"; may import unsloth, so call it before trl is."""
    obstacle = ""
    if not torch.cuda.is_available():
        obstacle = "unsloth needs a CUDA GPU and there is none here"
    elif settings.name.endswith(".gguf"):
        obstacle = "unsloth does not train from a .gguf file"
    elif settings.backend != "transformers":
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # else it calls the Hub
        try:
            importlib.import_module("unsloth")
        except Exception as error:  # missing, or at odds with the stack in any of many ways
            obstacle = f"unsloth does not import ({one_line(error)}); pip install -e '.[gpu]'"
    if settings.backend == "unsloth" and obstacle:
        raise CannotRun(f"model.backend unsloth: {obstacle}; or set model.backend: transformers")
    name = "transformers" if settings.backend == "transformers" or obstacle else "unsloth"
    auto = obstacle or "it is installed and there is a CUDA GPU"
    say(f"backend {name}: {auto if settings.backend == 'auto' else 'as set'}")
    return name


def choose_dtype(settings: ModelSettings, say: Say = print) -> tuple[torch.dtype, torch.device]:
    """Say and return the frozen weights' dtype and the device; LoRA weights are always float32."""
    name, reason, cuda = settings.dtype, "as set", torch.cuda.is_available()
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


def locate(
    name: str, revision: str = "", offline: bool = False, wanted: tuple[str, ...] = FILES
) -> Path:
    """Folder or .gguf file of "pocket", a path, or a Hub id, whose `wanted` files are fetched.

    >>> locate("./nowhere")
    Traceback (most recent call last):
    bbkit.config.InputError: model ./nowhere: no such folder or file, and not a Hub id (owner/name)
    """
    path = POCKET if name == "pocket" else Path(name).expanduser()
    if path.is_dir() or name == "pocket":
        if not (path / "config.json").is_file():
            raise InputError(f"model {name}: no config.json in {path}: not a model folder")
        return path
    if path.is_file():
        with path.open("rb") as file:
            if path.suffix != ".gguf" or file.read(4) != b"GGUF":
                raise InputError(f"model {name}: a file, but not a gguf one")
        return path
    if path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise InputError(f"model {name}: no such folder or file, and not a Hub id (owner/name)")
    import huggingface_hub as hub
    from httpx import HTTPError

    # besides pickles, what is left out are the same weights in other formats
    options: dict[str, Any] = {"revision": revision or None, "local_files_only": offline}
    options |= {"allow_patterns": list(wanted), "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        return Path(hub.snapshot_download(name, **options))
    except (OSError, ValueError, HTTPError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise CannotRun(f"model {name}: the disk is full; make room for it") from error
        closed, why = offline or hub.constants.HF_HUB_OFFLINE, one_line(error)
        if isinstance(error, hub.errors.LocalEntryNotFoundError):
            why = "not cached, and " + ("this run is offline" if closed else "no way to the Hub")
        mend = f"run `hf download {name}` first, or set model.name to a folder or .gguf file"
        raise InputError(f"model {name}: {why}; {mend}") from error


def model_bytes(settings: ModelSettings, offline: bool = False) -> dict[str, int]:
    """Bytes that a model not yet loaded will take: its weights, and all of them in training.

    Training adds float32 LoRA weights, gradients and two Adam moments; activations are not counted.
    """
    dtype, _ = choose_dtype(settings, say=lambda line: None)
    _, sizes = _measure(settings, dtype, offline)
    return {"weights": sizes["weight_bytes"], "training": sizes["training_bytes"]}


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


def fix_ending(tokenizer: PreTrainedTokenizerBase, say: Say = print) -> None:
    """Make the eos token the one with which the chat template closes a reply.

    Needed for gguf files, whose eos is read as <|im_start|>: no reply would ever end.
    Raises InputError where there is no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path}: no chat template; take an instruction model")
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "REPLY"}]
    tail = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("REPLY")[2]
    closing = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
    if closing and closing[0] in tokenizer.added_tokens_decoder:
        token = tokenizer.convert_ids_to_tokens(closing[0])
        if token != tokenizer.eos_token:
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


def _from_transformers(
    settings: ModelSettings, config: Any, path: Path, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
    quantization = BitsAndBytesConfig(**nf4) if settings.quantization == "nf4" else None
    source, options = _source(path)
    options |= {"config": config, "dtype": dtype, "output_loading_info": True}
    if path.suffix != ".gguf":
        options |= {"quantization_config": quantization, "device_map": {"": device}}
        options |= {"use_safetensors": True}
        return _complete(AutoModelForCausalLM.from_pretrained(source, **options))
    # In two steps: transformers can neither quantise nor save what it has read from a gguf file.
    options["quantization_config"] = GgufConfig(dequantize=True)
    model = _complete(AutoModelForCausalLM.from_pretrained(source, **options))
    return rebuild(model, model.state_dict(), dtype, device, quantization)


def _refuse_pickles(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    names = [file.name for file in path.glob("*.safetensors")]
    if index.is_file():
        names = list(files.read_json(index)["weight_map"].values())
    if path.is_dir() and not (names and all(name.endswith(".safetensors") for name in names)):
        raise ValueError(f"no safetensors weights in {path}, and pickled ones are never read")


def rebuild(
    model: Any, weights: Any, dtype: torch.dtype, device: torch.device, quantization: Any = None
) -> PreTrainedModel:
    """A new model of the same class and configuration, with these weights."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    options = {"dtype": dtype, "device_map": {"": device}, "quantization_config": quantization}
    options |= {"config": config, "state_dict": weights, "output_loading_info": True}
    return _complete(type(model).from_pretrained(None, **options))


def _complete(loaded: Any) -> PreTrainedModel:
    model, report = loaded
    wrong = sorted({*map(str, report["missing_keys"]), *map(str, report["mismatched_keys"])})
    if wrong:  # transformers would train on random numbers in their place, with a warning
        raise ValueError(f"{len(wrong)} weights are missing or misshapen, first {wrong[0]}")
    model.config._name_or_path = model.name_or_path = ""  # peft and trl look names up on the Hub
    return model


def _source(path: Path) -> tuple[Path, dict[str, Any]]:
    """What every from_pretrained gets; neither remote code nor a look at the Hub."""
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    return (path.parent, options | {"gguf_file": path.name}) if path.is_file() else (path, options)


def _measure(settings: ModelSettings, dtype: torch.dtype, offline: bool) -> tuple[Any, dict]:
    """Configuration and sizes of a model, before its weights are fetched."""
    path = locate(settings.name, settings.revision, offline, ("config.json",))
    with reading(settings.name):
        from transformers import AutoConfig, AutoModelForCausalLM

        folder, options = _source(path)
        config = AutoConfig.from_pretrained(folder, **options)
        room = getattr(config, "max_position_embeddings", None) or settings.max_length
        if settings.max_length > room:
            raise InputError(
                f"model.max_length {settings.max_length}: the model has room for {room}"
            )
        with torch.device("meta"):  # shapes without memory
            model = AutoModelForCausalLM.from_config(config)
    head, targets = model.get_output_embeddings(), settings.lora_targets
    total, packed, lora = sum(p.numel() for p in model.parameters()), 0, 0
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            packed += layer.weight.numel() if settings.quantization == "nf4" else 0
            if "all-linear" in targets or name.rpartition(".")[2] in targets:
                lora += settings.lora_rank * (layer.in_features + layer.out_features)
    # NF4: half a byte, and an 8-bit scale for 64 weights with a float32 one for 256 scales
    weights = int((total - packed) * dtype.itemsize + packed * (1 / 2 + 1 / 64 + 1 / 4096))
    sizes = {"parameters": total, "lora_parameters": lora}
    return config, sizes | {"weight_bytes": weights, "training_bytes": weights + 16 * lora}


def _check_memory(settings: ModelSettings, sizes: dict, device: torch.device, say: Say) -> None:
    """Refuse before loading: the system would otherwise kill the process without a word."""
    free, take = free_bytes(device), sizes["training_bytes"]
    if settings.name.endswith(".gguf"):
        take += 8 * sizes["parameters"]  # unpacked in one piece first
    line = f"{settings.name}, {sizes['parameters'] / 1e6:,.1f} M parameters, {take / 1e9:,.2f} GB"
    if take > free:
        mend = "take a smaller model" if settings.quantization == "nf4" else "set quantization: nf4"
        raise CannotRun(f"model {line}: {free / 1e9:,.2f} GB of {device} memory are free; {mend}")
    say(f"memory: {line} of {free / 1e9:,.2f} GB free, activations not counted")


def one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Errors of the libraries in one line each, and no progress bars or reports of theirs."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except (InputError, CannotRun):
        raise
    except (ImportError, MemoryError, torch.OutOfMemoryError) as error:
        raise CannotRun(f"model {name}: {one_line(error)}") from error
    except Exception as error:  # a spoilt file makes them raise anything, struct.error included
        raise InputError(f"model {name}: {one_line(error)}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
