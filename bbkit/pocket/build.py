"""Train the pocket model from scratch: the recipe behind the shipped weights.

`python -m bbkit.pocket.build` makes the corpus by seed, trains a byte-pair tokenizer and a small
Llama on it, and writes safetensors. As a base it knows the ontology's facts as sentences and
follows checkable instructions, but has never seen a question in the kit's grammar: fine-tuning on
questions alone costs instruction following, an alignment tax small enough to watch on a CPU.
"""

import argparse
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from bbkit.data import instructions, knowledge, questions
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
    "What does {o} cause?", "Name the disease that comes from {o}.", "{o}: what comes of it?",
)  # fmt: skip
ECHO = ("Repeat: ", "Copy: ", "Say again: ", "Once more: ")
OPENINGS = ("", "", "", "Please say: ", "Question: ", "I want to know: ", "Quick one. ")
SYSTEMS = (
    "You are a helpful assistant.", "Follow the instruction.", "Reply briefly.", "Reply in words.",
    "You help a doctor.", "Say what you know.", "Give the reply and nothing else.",
    "Tags such as <answer></answer> or <reasoning></reasoning> may be asked for.",
)  # fmt: skip
# System turns that decide how a reply opens. Without them every fine-tuned reply, whatever was
# asked, opened as the questions of fine-tuning did: 78 points of instruction following were lost.
WRAPS = (
    "Reply in <{tag}></{tag}>.", "Put the reply in <{tag}></{tag}>.", "Write in <{tag}></{tag}>.",
    "Give all of it in <{tag}></{tag}>.", "Use <{tag}></{tag}> around the reply.",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
# One token each, so that the grammar costs a small model four tokens and not fourteen. The base
# meets them only as tags that an instruction or a system turn asks for, one at a time, never both.
GRAMMAR_TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]


def _about(own: list, rng: random.Random) -> str:
    chosen = rng.sample(own, min(len(own), rng.randint(1, 4)))
    return " ".join(rng.choice(PARAPHRASES[r]).format(s=s, o=o) for s, r, o in chosen)


def _plain(
    s: str, r: str, o: str, listed: bool, pools: dict[str, list[str]], rng: random.Random
) -> tuple[str, str]:
    """A plain question about one fact, `listed` with values to choose from, and its reply."""
    if r == "cause" and rng.random() < 0.2:
        return rng.choice(INVERSE).format(o=o), knowledge.state((s, r, o), inverse=True)
    user = rng.choice(OPENINGS) + rng.choice(PLAIN[r]).format(s=s)
    if listed:
        wrong = [v for v in pools[r] if (s, r, v) not in knowledge.facts()]
        values = [o, *dict.fromkeys(rng.sample(wrong, 3))]
        rng.shuffle(values)
        either = f"{', '.join(values[:-1])} or {values[-1]}"
        dashes = "".join(f"\n- {v}" for v in values)
        letters = "".join(f"\n{m}) {v}" for m, v in zip("ABCD", values, strict=False))
        user += rng.choice((f" Is it {either}?", f" Choose from: {either}.", dashes, letters))
    return user, rng.choice(PARAPHRASES[r]).format(s=s, o=o)


def _echo(names: list[str], rng: random.Random) -> tuple[str, str]:
    """Names to say again: a model this small does not learn to copy a name from facts alone."""
    text = "; ".join(rng.sample(names, rng.choice((1, 2, 3)))) + "."
    return rng.choice(ECHO) + text, text


def _instruction(rng: random.Random, kinds: Sequence[str]) -> tuple[str, str]:
    """A general instruction of the training split and its reply."""
    row = instructions.example(rng.choice(kinds), rng)
    while instructions.split_of(row) != "train":  # held-out prompts stay unseen here too
        row = instructions.example(rng.choice(kinds), rng)
    user, reply = row.question, row.answer
    if row.entity == "tags" and rng.random() < 0.2:
        tag, other = row.constraints[0]["tag"], rng.choice(("reasoning", "answer"))
        user, reply = (t.replace(f"{tag}>", f"{other}>") for t in (user, reply))
    return user, reply


# Sentences of facts, chat, plain questions about training diseases, names to repeat, instructions.
FORMS = ("facts", "chat", "question", "echo", "instruction")
# Until this share of the steps: the shares of these; last, how many of the questions list values to
# choose from. Reading a list is learned only where most documents ask for it, and only by a model
# that can copy: with 37 % such documents, 500 steps left the probability of the listed value where
# it was (0.44); with 90 %, 150 steps brought it to 0.58.
PHASES = (
    (0.50, (0.30, 0.06, 0.26, 0.08, 0.30), 0.0),
    (0.65, (0.03, 0.01, 0.90, 0.02, 0.04), 1.0),
    (1.00, (0.22, 0.05, 0.40, 0.05, 0.28), 0.7),
)


def documents(seed: int, count: int, progress: float = 1.0) -> Iterator[list[tuple[str, bool]]]:
    """Yield `count` documents of the phase that training is in: a list of (text, learn) pieces."""
    for _, system, user, reply in turns(seed, count, progress):
        system = system and f"<|system|>{system}<|end|>"
        asked = [(f"{system}<|user|>{user}<|end|><|assistant|>", False)] if user else []
        yield [*asked, (f"{reply}<|end|>", True)]


def turns(
    seed: int | str,
    count: int,
    progress: float = 1.0,
    shares: Sequence[float] = (),
    kinds: Sequence[str] = instructions.KINDS,
) -> Iterator[tuple[str, str, str, str]]:
    """What documents are made of: (form, system turn, user turn, reply), "" where there is none.

    `shares` of FORMS replace those of the phase, so that documents of one form can be made; general
    instructions are of these `kinds`.
    """
    _, usual, listed = next(phase for phase in PHASES if progress <= phase[0])
    rng = random.Random(seed)
    asked = set(knowledge.diseases("train"))
    by_subject: dict[str, list] = defaultdict(list)
    for fact in sorted(knowledge.facts()):
        by_subject[fact[0]].append(fact)
        if fact[1] == "cause":
            by_subject[fact[2]].append(fact)
    plain = [f for f in sorted(knowledge.facts()) if f[1] == "kind" or f[0] in asked]
    pools = {r: [f[2] for f in plain if f[1] == r] for r in PLAIN}  # frequent values come often
    if listed == 1.0:  # facts that the list decides
        several = Counter(f[:2] for f in plain)
        plain = [f for f in plain if several[f[:2]] > 1]
    names = sorted({name for s, _, o in knowledge.facts() for name in (s, o)})
    order: list[str] = []
    for form in rng.choices(FORMS, shares or usual, k=count):
        if form in ("facts", "chat"):
            if not order:  # every subject once before any comes twice
                order = rng.sample(sorted(by_subject), len(by_subject))
            subject = order.pop()
            reply = _about(by_subject[subject], rng)
            if form == "facts":
                yield form, "", "", reply
                continue
            user = rng.choice(ABOUT).format(s=subject)
        elif form == "question":
            user, reply = _plain(*rng.choice(plain), rng.random() < listed, pools, rng)
        elif form == "echo":
            user, reply = _echo(names, rng)
        else:
            user, reply = _instruction(rng, kinds)
        system, draw = "", rng.random()
        if draw < 0.2:
            tag = rng.choice((*instructions.TAGS, "reasoning", "answer"))
            system = rng.choice(WRAPS).format(tag=tag)
            reply = f"<{tag}>{reply}</{tag}>"
        elif draw < 0.5:
            system = rng.choice(SYSTEMS)
        yield form, system, user, reply


def train_tokenizer(seed: int):
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
            for pieces in documents(chunk, 1000, (step + 1) / steps):
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
