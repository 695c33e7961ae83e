"""Greedy replies of a model to held-out prompts, and how far along them it is from its base.

Serves every claim: what is measured is what is made here.
"""

from collections.abc import Iterator, Sequence

from bbkit import prompts
from bbkit.prompts import Example

PART = 32  # new tokens on a CPU, after which replies that have ended leave the batch


def generate(
    model,
    tokenizer,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_tokens: int,
    progress=None,
) -> list[str]:
    """Greedy replies in the order of `examples`; batches hold prompts of like length.

    A batch takes at most `batch_tokens` tokens of prompts and replies together, or one prompt.
    Returns decoded text without special tokens. The model's training mode is restored.
    """

    texts = [
        tokenizer.apply_chat_template(
            prompts.messages(e), add_generation_prompt=True, tokenize=False
        )
        for e in examples
    ]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    lengths = [len(tokens) for tokens in encoded]
    # The longest first: what does not fit in memory fails at once, not after an hour.
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    replies = [""] * len(texts)
    was_training = model.training
    model.eval()
    while order:
        most = max(1, batch_tokens // (lengths[order[0]] + max_new_tokens))
        chosen, order = order[:most], order[most:]
        batch = tokenizer(
            [texts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left",
            add_special_tokens=False,
        ).to(model.device)  # fmt: skip
        new = _greedy(model, tokenizer, batch, max_new_tokens)
        for i, text in zip(
            chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            replies[i] = text
        if progress:
            progress(len(chosen))
    model.train(was_training)
    return replies


def _greedy(model, tokenizer, batch, max_new_tokens: int) -> list[list[int]]:
    """New tokens of each row; on a CPU rows that have ended leave the batch after PART tokens.

    On a GPU a smaller batch saves little, and unsloth's generation takes no cache to go on from.
    """
    import torch

    ids, mask = batch["input_ids"], batch["attention_mask"]
    part = PART if ids.device.type == "cpu" else max_new_tokens
    cache, start = None, ids.shape[1]
    found: list[list[int]] = [[] for _ in ids]
    left = list(range(len(ids)))
    while left:
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache,
                max_new_tokens=min(part, start + max_new_tokens - ids.shape[1]),
                do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                return_dict_in_generate=True,
            )  # fmt: skip
        ids, cache = out.sequences, out.past_key_values
        for row, i in enumerate(left):
            found[i] = ids[row, start:].tolist()
        ended = (ids[:, start:] == tokenizer.eos_token_id).any(1)
        stay = (~ended).nonzero()[:, 0]
        if ids.shape[1] == start + max_new_tokens or not len(stay):
            return found
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
        ids, mask, left = ids[stay], mask[stay], [left[row] for row in stay.tolist()]
        cache.batch_select_indices(stay)
    return found


def divergence(
    model, tokenizer, examples: Sequence[Example], replies: Sequence[str]
) -> list[float]:
    """KL(π‖π_base) in nats per token along each reply to its prompt, exact over the vocabulary.

    Along greedy replies: the distance where the model goes, no estimate of the KL of sequences.
    `model` is a PEFT model; the base is the same model with its adapter off.
    """
    pairs = zip(examples, replies, strict=True)
    rows = [prompts.encode(tokenizer, example, reply) for example, reply in pairs]
    found = [0.0] * len(rows)
    for i, ours, bases in beside_base(model, tokenizer, rows):
        found[i] = (ours.exp() * (ours - bases)).sum(-1).mean().item()
    return found


def beside_base(model, tokenizer, rows: Sequence[tuple[list[int], int]]) -> Iterator:
    """Of each row of tokens its place, and what the model and its base give along the reply.

    `rows` hold the tokens of prompt and reply, and how many are the prompt's, at least one. Both
    are log-probabilities (tokens of the reply, vocabulary) in nats. `model` is a PEFT model in
    any mode, which is restored at the end; the base is the same model with its adapter off.
    """
    import torch

    was_training = model.training
    model.eval()
    for chosen, ids, mask in prompts.batches([whole for whole, _ in rows], tokenizer, model):
        first = min(rows[i][1] for i in chosen) - 1  # what predicts the first token of a reply
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= {"logits_to_keep": ids.shape[1] - first}
        with torch.no_grad():
            ours = model(**inputs).logits
            with model.disable_adapter():
                bases = model(**inputs).logits
        for row, i in enumerate(chosen):
            reply = slice(rows[i][1] - 1 - first, len(rows[i][0]) - 1 - first)
            yield i, *(logits[row, reply].float().log_softmax(-1) for logits in (ours, bases))
    model.train(was_training)
