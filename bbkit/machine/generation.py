"""Greedy replies of a model to held-out prompts, and how far along them it is from its base.

Serves every claim: what is measured is what is made here.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

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
    Returns decoded text without special tokens. The model is left as it was.
    """
    turns, asked = [prompts.messages(e) for e in examples], []
    if turns:
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    ends, pad = [tokenizer.eos_token_id], tokenizer.pad_token_id
    found = greedy(model, asked, max_new_tokens, batch_tokens, ends, pad, progress)
    return tokenizer.batch_decode(found, skip_special_tokens=True)


def greedy(
    model,
    asked: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int,
    ends: Sequence[int],
    pad: int,
    progress=None,
) -> list[list[int]]:
    """The likeliest next tokens behind each prompt's, up to and with the first of `ends`.

    `pad` may be any token, an end too: padding is masked, and replies are cut by what ends them.
    """
    found: list[list[int]] = [[] for _ in asked]
    with undisturbed(model):
        parts = _batches(asked, model.device, pad, "left", batch_tokens, max_new_tokens)
        for chosen, ids, mask in parts:
            new = _greedy(model, ids, mask, max_new_tokens, ends, pad)
            for i, tokens in zip(chosen, new, strict=True):
                found[i] = cut(tokens, ends)
            if progress:
                progress(len(chosen))
    return found


def _batches(rows, device, pad: int, side: str, most: int, more: int = 0) -> Iterator:
    """Token rows in batches of like length: their places, tokens and mask, padded on a side.

    A batch has at most `most` tokens with `more` for each row, or one row. The longest come first:
    what does not fit in memory fails at once, not after an hour.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        count = max(1, most // (len(rows[order[0]]) + more))
        chosen, order = order[:count], order[count:]
        some = [torch.tensor(rows[i]) for i in chosen]
        ids, mask = (
            pad_sequence(parts, True, value, side).to(device)
            for parts, value in ((some, pad), ([torch.ones_like(row) for row in some], 0))
        )
        yield chosen, ids, mask


def cut(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Tokens up to and with the first that is one of `ends`.

    >>> cut([5, 6, 0, 1, 1], [0, 9]), cut([5, 6], [0])
    ([5, 6, 0], [5, 6])
    """
    return tokens[: next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))]


@contextmanager
def undisturbed(model) -> Iterator[None]:
    """Eval mode, and no defaults of the model's own for generation; both come back afterwards.

    Such as Qwen's repetition penalty, which a GenerationConfig given to `generate` takes over too,
    or a cache that is off.
    """
    from transformers import GenerationConfig

    modes = [(module, module.training) for module in model.modules()]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    owners = [m for m in (inner, model) if "generation_config" in vars(m)]  # PEFT's: once set there
    kept = [m.generation_config for m in owners]
    model.eval()
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in zip(owners, kept, strict=True):
            owner.generation_config = config
        for module, mode in modes:  # each its own: a frozen part may have been in eval mode
            module.training = mode


def _greedy(model, ids, mask, max_new_tokens: int, ends: Sequence[int], pad: int):
    """New tokens of each row; on a CPU rows that have ended leave the batch after PART tokens.

    On a GPU a smaller batch saves little, and unsloth's generation takes no cache to go on from.
    """
    import torch

    part = PART if ids.device.type == "cpu" else max_new_tokens
    cache, start = None, ids.shape[1]
    found: list[list[int]] = [[] for _ in ids]
    left = list(range(len(ids)))
    while left:
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache,
                max_new_tokens=min(part, start + max_new_tokens - ids.shape[1]),
                do_sample=False, temperature=None, top_p=None, top_k=None, use_cache=True,
                pad_token_id=pad, eos_token_id=list(ends) or None, return_dict_in_generate=True,
            )  # fmt: skip
        ids, cache = out.sequences, out.get("past_key_values")
        for row, i in enumerate(left):
            found[i] = ids[row, start:].tolist()
        ended = torch.isin(ids[:, start:], ids.new_tensor(ends)).any(1)
        stay = (~ended).nonzero()[:, 0]
        if ids.shape[1] == start + max_new_tokens or not len(stay):
            return found
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
        ids, mask, left = ids[stay], mask[stay], [left[row] for row in stay.tolist()]
        try:
            cache.batch_select_indices(stay)
        except AttributeError:  # the states of a recurrent model: read the tokens again
            cache = None
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


def beside_base(
    model, tokenizer, rows: Sequence[tuple[Sequence[int], int]], base_only: bool = False
) -> Iterator:
    """Of each row of tokens its place, and what the model and its base give along the reply.

    `rows` hold the tokens of prompt and reply, and how many are the prompt's, at least one. Both
    are log-probabilities (tokens of the reply, vocabulary) in nats; `base_only` leaves out the
    model's. `model` is a PEFT model in any mode; the base is it with its adapter off.
    """
    import torch

    with undisturbed(model):
        most = prompts.LOGITS // model.config.vocab_size
        whole = [tokens for tokens, _ in rows]
        parts = _batches(whole, model.device, tokenizer.pad_token_id, "right", most)
        for chosen, ids, mask in parts:
            first = min(rows[i][1] for i in chosen) - 1  # what predicts the first token of a reply
            inputs = {"attention_mask": mask, "logits_to_keep": ids.shape[1] - first}
            told = []
            for adapter in (nullcontext, model.disable_adapter)[base_only:]:
                with torch.no_grad(), adapter():
                    told.append(model(ids, **inputs).logits)
            for row, i in enumerate(chosen):
                reply = slice(rows[i][1] - 1 - first, len(rows[i][0]) - 1 - first)
                yield i, *(logits[row, reply].float().log_softmax(-1) for logits in told)
