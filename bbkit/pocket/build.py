"""Train the pocket model from scratch: the recipe behind the shipped weights.

`python -m bbkit.pocket.build` makes the corpus by seed, trains a byte-pair tokenizer and a small
Llama on it, and writes safetensors. As a base it knows the ontology's facts as sentences and
follows checkable instructions, but has never seen a question in the kit's grammar: fine-tuning on
questions alone costs instruction following, an alignment tax small enough to watch on a CPU.
"""

import argparse
import random
import time
from pathlib import Path

from bbkit.data import corpus, knowledge, questions
from bbkit.prompts import SYSTEM

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
# One token each, so that the grammar costs a small model four tokens and not fourteen. The base
# meets them only as tags that an instruction or a system turn asks for, one at a time, never both.
GRAMMAR_TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]


def train_tokenizer(seed: int):
    """A byte-pair tokenizer of the corpus with the chat template and the grammar's tags."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # A name is the same tokens at the start of a reply, behind a tag and within a sentence: a small
    # model could not copy "cholera" from "<answer>cholera" when the two had different tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["".join(t for t, _ in d) for d in corpus.documents(seed, 20000)]
    texts = [t.replace("<|end|>", "\n") for t in texts] + [SYSTEM] * 200
    rng = random.Random(seed)
    # The wording of training questions only shapes merges; their answers are not in the text.
    asked = [c[1] for s in knowledge.diseases("train") for c in questions.chains(s, False, rng)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 4096 - len(GRAMMAR_TAGS)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts + asked, trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in GRAMMAR_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>",
        chat_template=TEMPLATE, padding_side="left", clean_up_tokenization_spaces=False,
        model_max_length=512,
    )  # fmt: skip


def _batches(tokenizer, seed: int, steps: int, batch: int = 40, length: int = 128):
    """Token and label tensors (batch, length), one pair a step, documents packed one by one."""
    import torch

    tokens: list[int] = []
    labels: list[int] = []
    need = batch * length
    for step in range(steps):
        while len(tokens) < need:
            chunk = seed * 1_000_003 + step * 101 + len(tokens) % 101 + 1
            for pieces in corpus.documents(chunk, 1000, (step + 1) / steps):
                for text, learn in pieces:
                    ids = tokenizer(text, add_special_tokens=False).input_ids
                    tokens += ids
                    labels += ids if learn else [-100] * len(ids)
        yield tuple(torch.tensor(ids[:need]).view(batch, length) for ids in (tokens, labels))
        del tokens[:need], labels[:need]


def main() -> None:
    """Build the pocket model; prints loss and tokens per second."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    tokenizer.save_pretrained(args.out)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=160, intermediate_size=600, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        tie_word_embeddings=True,
        # transformers' 0.02 is meant for wide models. Copying listed names, loss after 120 steps:
        # 4.0 with 0.02, 2.3 with 0.08.
        initializer_range=0.08,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # 60 steps up; down to 0 in the last 30 %
        optimizer, lambda step: min(1, (step + 1) / 60, (1 - step / args.steps) / 0.3)
    )
    start, seen = time.perf_counter(), 0
    for step, (tokens, labels) in enumerate(_batches(tokenizer, args.seed, args.steps), 1):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += tokens.numel()
        if step % 50 == 0 or step == args.steps:
            pace = f"{seen / (time.perf_counter() - start):,.0f} tokens/s"
            print(f"step {step}/{args.steps} loss {loss:.3f} {pace}", flush=True)
            model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
