"""Train the pocket model from scratch: the recipe behind the shipped weights.

`python -m bbkit.pocket.build` makes the corpus by seed, trains a byte-pair tokenizer and a small
Llama on it, and writes safetensors. As a base it knows the ontology's facts as sentences and
follows the kit's checkable instructions; it has never seen a question in the kit's grammar. So
fine-tuning on questions alone costs instruction following: the alignment tax, small enough to watch
on a CPU.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from bbkit import instructions, knowledge
from bbkit.prompts import SYSTEM

PARAPHRASES = {
    "cause": (
        "{s} is caused by {o}.", "{o} causes {s}.", "The cause of {s} is {o}.", "{o} leads to {s}.",
        "{s} comes from {o}.", "Infection with {o} results in {s}.", "Behind {s} stands {o}.",
    ),
    "transmission": (
        "{s} is transmitted by {o}.", "{s} spreads through {o}.", "{o} transmit {s}.",
        "The route of {s} is {o}.", "People get {s} from {o}.", "{s} reaches people through {o}.",
    ),
    "symptom": (
        "{s} has the symptom {o}.", "A symptom of {s} is {o}.", "Patients with {s} have {o}.",
        "{o} is seen in {s}.", "{s} brings {o}.", "One sign of {s} is {o}.", "In {s} there is {o}.",
    ),
    "site": (
        "{s} affects the {o}.", "{s} sits in the {o}.", "The {o} is affected by {s}.",
        "The site of {s} is the {o}.", "{s} harms the {o}.", "{s} is found in the {o}.",
    ),
    "kind": (
        "{s} is a {o}.", "{s} belongs to the kind {o}.", "A {o} named {s} is known.",
        "{s} is a kind of {o}.", "The organism {s} is a {o}.",
    ),
}  # fmt: skip
ABOUT = ("Tell me about {s}.", "What do you know about {s}?", "Describe {s}.", "Write about {s}.")
# Plain questions about the training diseases only, answered in a sentence: what lets a small model
# find a fact by the name in a question. Not the kit's wording, nor its options, nor its grammar.
PLAIN = {
    "cause": (
        "Name the cause of {s}.", "What is {s} caused by?", "Where does {s} come from?",
        "What is behind {s}?", "By what is {s} caused?", "In {s}, what is the cause?",
    ),
    "transmission": (
        "Name how {s} spreads.", "How do people get {s}?", "What brings {s} to people?",
        "By what route does {s} spread?", "{s}: how does it spread?", "How is {s} caught?",
    ),
    "symptom": (
        "Name a symptom of {s}.", "What do patients with {s} have?", "Name one sign of {s}.",
        "What is seen in {s}?", "{s}: what is a symptom?", "What does {s} bring?",
    ),
    "site": (
        "Name the site of {s}.", "What does {s} harm?", "Where does {s} sit?",
        "Which organ suffers in {s}?", "{s}: where is it found?", "What part is hit by {s}?",
    ),
    "kind": (
        "Name the kind of {s}.", "What sort of organism is {s}?", "{s}: which kind is it?",
        "To which kind does {s} belong?",
    ),
}  # fmt: skip
INVERSE = (
    "What does {o} cause?",
    "Name the disease that comes from {o}.",
    "{o}: what comes of it?",
)
OPENINGS = ("", "", "", "Please say: ", "Question: ", "I want to know: ", "Quick one. ")
SYSTEMS = (
    "You are a helpful assistant.", "Follow the instruction.", "Reply briefly.", "Reply in words.",
    "You help a doctor.", "Say what you know.", "Give the reply and nothing else.",
    "Tags such as <answer></answer> or <reasoning></reasoning> may be asked for.",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
# One token each, so that the grammar costs a small model four tokens and not fourteen. The base
# meets them only as tags that an instruction asks for, one at a time, never as the grammar.
GRAMMAR_TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]


def _about(subject: str, own: list, rng: random.Random, most: int = 4) -> str:
    chosen = rng.sample(own, min(len(own), rng.randint(1, most)))
    return " ".join(rng.choice(PARAPHRASES[r]).format(s=s, o=o) for s, r, o in chosen)


def _plain(
    s: str, r: str, o: str, pools: dict[str, list[str]], rng: random.Random
) -> tuple[str, str]:
    """A plain question and its reply in a sentence; four in ten name values to choose from."""
    if r == "cause" and rng.random() < 0.3:
        return rng.choice(INVERSE).format(o=o), knowledge.state((s, r, o), inverse=True)
    user = rng.choice(OPENINGS) + rng.choice(PLAIN[r]).format(s=s)
    if rng.random() < 0.4:
        right = {f[2] for f in knowledge.facts() if f[:2] == (s, r)}
        others = rng.sample([v for v in pools[r] if v not in right], 2)
        values = rng.sample([o, *others], 3)
        if rng.random() < 0.5:
            user += "".join(f"\n- {v}" for v in values)
        else:
            user += " Is it {}, {} or {}?".format(*values)
    return user, rng.choice(PARAPHRASES[r]).format(s=s, o=o)


def _instruction(rng: random.Random) -> tuple[str, str]:
    """A general instruction of the training split and its reply."""
    row = instructions.example(rng.choice(instructions.KINDS), rng)
    while instructions.split_of(row) != "train":  # held-out prompts stay unseen here too
        row = instructions.example(rng.choice(instructions.KINDS), rng)
    user, reply, words = row.question, row.answer, row.constraints[0].get("text", "")
    if row.entity == "tags" and rng.random() < 0.2:
        tag, other = row.constraints[0]["tag"], rng.choice(("reasoning", "answer"))
        user, reply = (t.replace(f"{tag}>", f"{other}>") for t in (user, reply))
    if user.endswith(f": {words}") and rng.random() < 0.3:
        listed = "".join(f"\n{mark}) {w}" for mark, w in zip("ABCD", words.split(), strict=False))
        user = user.removesuffix(f" {words}") + listed
    return user, reply


def documents(seed: int, count: int) -> Iterator[list[tuple[str, bool]]]:
    """Yield `count` documents: a list of (text, learn) pieces; prompts are not learned.

    30 % are fact sentences, 6 % chat about a disease, 30 % plain questions about diseases of the
    training split, 34 % general instructions. Prompts also come as lists of lines, lettered ones in
    general instructions only: to a model that has never seen such lines they hide the disease (it
    named the right one in 5 % of its replies to lettered questions, in 98 % without the letters).
    """
    rng = random.Random(seed)
    asked = set(knowledge.diseases("train"))
    by_subject: dict[str, list] = defaultdict(list)
    for fact in sorted(knowledge.facts()):
        by_subject[fact[0]].append(fact)
        if fact[1] == "cause":
            by_subject[fact[2]].append(fact)
    plain = [f for f in sorted(knowledge.facts()) if f[1] == "kind" or f[0] in asked]
    pools = {r: sorted({f[2] for f in plain if f[1] == r}) for r in PLAIN}
    order: list[str] = []
    for _ in range(count):
        draw = rng.random()
        if draw < 0.36:
            if not order:  # every subject once before any comes twice
                order = rng.sample(sorted(by_subject), len(by_subject))
            subject = order.pop()
            reply = _about(subject, by_subject[subject], rng)
            if draw < 0.30:
                yield [(reply + "<|end|>", True)]
                continue
            user = rng.choice(ABOUT).format(s=subject)
        elif draw < 0.66:
            user, reply = _plain(*rng.choice(plain), pools, rng)
        else:
            user, reply = _instruction(rng)
        system = f"<|system|>{rng.choice(SYSTEMS)}<|end|>" if rng.random() < 0.4 else ""
        yield [(f"{system}<|user|>{user}<|end|><|assistant|>", False), (f"{reply}<|end|>", True)]


def train_tokenizer(seed: int, vocabulary: int):
    """A byte-pair tokenizer of the corpus with the chat template and the grammar's tags."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # A name is the same tokens at the start of a reply, behind a tag and within a sentence: a small
    # model could not copy "cholera" from "<answer>cholera" when the two had different tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["".join(t for t, _ in d) for d in documents(seed, 20000)]
    texts = [t.replace("<|end|>", "\n") for t in texts] + [SYSTEM] * 200
    asked = [row.question for row in knowledge.questions("train", seed)]
    # The wording of training questions only shapes merges; their answers are not in the text.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(GRAMMAR_TAGS), special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts + asked, trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in GRAMMAR_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>",
        chat_template=TEMPLATE, padding_side="left", clean_up_tokenization_spaces=False,
        model_max_length=512,
    )  # fmt: skip


def _batches(tokenizer, seed: int, batch: int, length: int):
    """Endless (batch, length) token and label tensors, documents packed one after another."""
    import torch

    tokens: list[int] = []
    labels: list[int] = []
    for chunk in range(1_000_000):
        for pieces in documents(seed * 1_000_003 + chunk + 1, 2000):
            for text, learn in pieces:
                ids = tokenizer(text, add_special_tokens=False).input_ids
                tokens += ids
                labels += ids if learn else [-100] * len(ids)
        need = batch * length
        while len(tokens) >= need:
            shape = (batch, length)
            yield torch.tensor(tokens[:need]).view(shape), torch.tensor(labels[:need]).view(shape)
            del tokens[:need], labels[:need]


def main() -> None:
    """Build the pocket model; prints loss and tokens per second."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()

    import time

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed, args.vocabulary)
    tokenizer.save_pretrained(args.out)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=args.hidden * 5 // 2,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 40,
        num_key_value_heads=args.hidden // 40, max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}")
    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.05
    )
    start, mean = time.perf_counter(), 0.0
    for step, (tokens, labels) in zip(
        range(1, args.steps + 1),
        _batches(tokenizer, args.seed, args.batch, args.length),
        strict=False,
    ):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean = 0.95 * mean + 0.05 * loss.item() if step > 1 else loss.item()
        if step % 50 == 0 or step == args.steps:
            speed = step * args.batch * args.length / (time.perf_counter() - start)
            print(f"step {step}/{args.steps} loss {mean:.3f} {speed:,.0f} tokens/s", flush=True)
            model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
