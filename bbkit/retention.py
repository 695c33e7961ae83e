"""Retention: the base's distribution along its own replies, kept by what a step may not do.

Serves the claim of no alignment tax: rewards say nothing about what none of them measures. The loss
is KL(base ‖ policy) along greedy replies of the base to broad prompts (bbkit.data.replies), in nats
a token; rules are a penalty on it, a budget for it on the step that the optimiser really takes (the
paper's orthogonality where it counts; a discrete control barrier, Ames et al. 2019), and A-GEM's
cone of gradients (arXiv 1812.00420), which Adam undoes. `keeping` puts them around any Trainer.
"""

from __future__ import annotations

import inspect
import random
import time
from collections import defaultdict, namedtuple
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from bbkit import InputError
from bbkit.combination import Limits
from bbkit.config import Settings
from bbkit.data import replies
from bbkit.data.replies import Reply
from bbkit.machine import adapters
from bbkit.prompts import LOGITS

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # the class is put before a trainer's, which unsloth replaces on import

RULES = ("penalty", "step", "cone")
Keeps = namedtuple("Keeps", "replies rule weight budget recovery per_step count longest base")


def batches(rows: Sequence[tuple[list[int], int]], vocabulary: int) -> Iterator[tuple]:
    """Token rows (tokens, how many of them are the prompt's) in parts: ids, mask, reply mask.

    Prompts end and replies begin at one column, so that `logits_to_keep` leaves out the prompts;
    the reply mask (n, T) is over the last T tokens. A part has at most LOGITS logits, or one row.
    """
    rows = sorted(rows, key=lambda row: len(row[0]) - row[1])
    while rows:
        longest = len(rows[-1][0]) - rows[-1][1]
        most = max(1, LOGITS // (vocabulary * (longest + 1)))
        part, rows = rows[-most:], rows[:-most]
        asked = max(prompt for _, prompt in part)
        ids = torch.zeros(len(part), asked + longest, dtype=torch.long)
        mask, told = torch.zeros_like(ids), torch.zeros(len(part), longest, dtype=torch.bool)
        for i, (tokens, prompt) in enumerate(part):
            start = asked - prompt
            ids[i, start : start + len(tokens)] = torch.tensor(tokens)
            mask[i, start : start + len(tokens)] = 1
            told[i, : len(tokens) - prompt] = True
        yield ids, mask, told


def divergence(model, base: Any, part: tuple) -> Tensor:
    """KL(base ‖ policy) in nats, full vocabulary, summed over the reply tokens of a part.

    A part is one of `batches`; with `base` None the base is the model with its adapter off.
    """
    ids, mask, told = (tensor.to(next(model.parameters()).device) for tensor in part)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0), "logits_to_keep": told.shape[1] + 1}
    known = inspect.signature(inner.forward).parameters
    given = {name: value for name, value in given.items() if name in known}

    def log_probabilities(some) -> Tensor:
        logits = some(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
        if logits.dim() != 3:
            raise InputError("retention: this model predicts no tokens, so it has no replies")
        return logits[:, -told.shape[1] - 1 : -1][told].float().log_softmax(-1)

    # Anew each step: stored once it would save a tenth of pocket's SFT step and a fiftieth of
    # GRPO's, and a resumed run would have to store it by the same batches to get the same bits.
    with torch.no_grad(), model.disable_adapter() if base is None else nullcontext():
        wanted = log_probabilities(model if base is None else base)
    ours = log_probabilities(model)
    return torch.nn.functional.kl_div(ours, wanted, reduction="sum", log_target=True)


def _replies(base, tokenizer, keeps: Keeps, seed: int) -> list[Reply]:
    """The replies that `keeping` was given, or asked for."""
    if tokenizer is None:
        raise InputError("retention: pass the tokenizer to the trainer, as processing_class")
    given = keeps.replies
    if isinstance(given, str):
        if given != "self":
            raise InputError(f'retention: replies {given!r}; give "self", prompts or rows')
        given = replies.own_turns(base, tokenizer, keeps.count, seed)
    elif isinstance(given, Sequence) and given and isinstance(given[0], Reply):
        return list(given)
    rows = replies.from_rows(tokenizer, given, keeps.count, seed)
    return rows.replies or replies.answered(base, tokenizer, rows.prompts, keeps.longest)


def keeping(
    trainer: type,
    replies: Any = "self",
    rule: str = "penalty",
    weight: float = 1.0,
    budget: float = 0.01,
    recovery: float = 0.3,
    per_step: int = 8,
    count: int = 512,
    max_new_tokens: int = 128,
    base: Any = None,
) -> type:
    """A subclass of any transformers or TRL `trainer` that keeps what its base model was.

    Built and used as `trainer` is. `replies`: "self", the base writes conversations before the
    first step (arXiv 2602.20162), no data needed; or prompts, which it then answers greedily; or
    rows with replies; both in TRL's forms (`bbkit.data.replies.from_rows`). At most `count` are
    taken, a reply of `max_new_tokens` at most. Each step takes `per_step` of them and their
    L = KL(base ‖ policy), nats a token, without dropout:

    - `penalty` adds `weight` × ∇L;
    - `step` lets the displacement that the optimiser made raise L by no more than `recovery` ×
      (`budget` − L) to first order, and above the budget makes it take so much back;
    - `cone` takes from the gradient what opposes ∇L, and no more.

    The base is the model with its adapter off, or `base`, a frozen copy, where all weights train.
    Logged: `retention/kl`, and for cone and step `retention/slope`, `/slope_kept`, `/cut`.
    Raises InputError for an unknown rule, where the trainer is built without a base or its adapter
    changes more than can be switched off, and at the first step where there is no tokenizer, no
    reply or no model of language.

    >>> from trl import SFTTrainer
    >>> issubclass(keeping(SFTTrainer, weight=0.5), SFTTrainer)
    True
    """
    if rule not in RULES:
        raise InputError(f"retention rule {rule!r}: use one of {', '.join(RULES)}")
    if per_step < 1 or count < 1:
        raise InputError(f"retention: per_step {per_step} and count {count}: 1 or more")
    keeps = Keeps(replies, rule, weight, budget, recovery, per_step, count, max_new_tokens, base)
    return type("Keeping", (Keeping, trainer), {"keeps": keeps})


class Keeping(Trainer):
    """A trainer that keeps what its base was; `keeping` puts it before a trainer's class."""

    keeps: Keeps
    model: Any  # the trainer's
    limits: Limits | None = None  # that of bbkit.capability, or ours
    _mine: Limits | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._noted: dict[str, list[float]] = defaultdict(list)
        self._kept: list[tuple[list[int], int]] = []
        self._base_of(self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("retention: not with FSDP or DeepSpeed, which scatter the weights")
        if self.keeps.base is None and not hasattr(self.model, "disable_adapter"):
            raise InputError(
                "retention: this model trains its own weights and has no adapter to switch off "
                "for its base: pass keeping(..., base=a frozen copy), or peft_config"
            )
        if self.keeps.base is not None:
            self.keeps.base.to(self.accelerator.device).eval()

    def _base_of(self, model) -> None:
        """What trains, and whether the base is still there: anew where a `model_init` made it."""
        self._trained = [p for p in model.parameters() if p.requires_grad]
        if self.keeps.rule != "penalty" and self.limits is self._mine:  # not bbkit.capability's
            self.limits = self._mine = Limits(self._trained, lambda n, v: self._noted[n].append(v))
        if self.keeps.base is None:
            adapters.refuse_changed_base(model)
        elif {*map(id, self.keeps.base.parameters())} & {*map(id, self._trained)}:
            raise InputError("retention: base is the model that trains; pass a frozen copy")

    def training_step(self, model, inputs, num_items_in_batch=None):
        value = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._kept = self._kept or self._made()
            began = time.perf_counter()
            self._keep(self.accelerator.unwrap_model(self.model))
            self._noted["seconds/retention"].append(time.perf_counter() - began)
        return value

    def _keep(self, model) -> None:
        """Put the rule into the gradients of the step, or in the way of it."""
        trains = [p for p in model.parameters() if p.requires_grad]
        if [*map(id, trains)] != [*map(id, self._trained)]:
            self._base_of(model)
        keeps, share = self.keeps, 0.0
        own = [p.grad for p in self._trained]
        for p in self._trained:
            p.grad = None
        level = self._backward(model)
        rows = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
        self._noted["retention/kl"].append(level)
        if keeps.rule == "penalty":
            share = keeps.weight
        elif keeps.rule == "cone":
            share = self._against(own, rows)
        for p, mine, row in zip(self._trained, own, rows, strict=True):
            p.grad = mine if not share else row * share if mine is None else mine + share * row
        if self.limits is not None and keeps.rule != "penalty":
            scaler = self.accelerator.scaler
            flat = torch.cat([row.flatten().float() for row in rows])
            flat /= scaler.get_scale() if scaler else 1.0
            bound = keeps.recovery * (keeps.budget - level)
            self.limits.watch(self.optimizer)
            self.limits.add("retention", flat, bound if keeps.rule == "step" else float("inf"))

    def _against(self, own, rows) -> float:
        """How much of ∇L the cone adds to the gradient: what takes its opposition away."""

        def dot(some) -> float:
            return sum((a * b).sum(dtype=torch.float64).item() for a, b in some)

        pairs = [(mine, row) for mine, row in zip(own, rows, strict=True) if mine is not None]
        size, whole = dot((row, row) for row in rows), dot((mine, mine) for mine, _ in pairs)
        share = max(0.0, -dot(pairs) / size) if size else 0.0
        self._noted["retention/cut"].append(share * (size / whole) ** 0.5 if whole else 0.0)
        return share

    def _backward(self, model) -> float:
        """Gradients of L on this step's replies into `.grad`, the mean over processes; L."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        drawn = random.Random(f"replies/{self.args.seed}/{self.state.global_step}")
        chosen = drawn.sample(self._kept, min(self.keeps.per_step, len(self._kept)))
        tokens = sum(len(whole) - asked for whole, asked in chosen)
        total = torch.zeros((), device=self.accelerator.device)
        words = model.config.get_text_config().vocab_size
        for part in batches(chosen[rank::world], words):
            with adapters.without_dropout(model):  # in the backward pass too: it may compute anew
                with self.compute_loss_context_manager():
                    loss = divergence(model, self.keeps.base, part) / tokens
                self.accelerator.backward(loss)
            total += loss.detach()
        if world > 1:
            total = self.accelerator.reduce(total, "sum")
            for p in self._trained:
                mine = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = self.accelerator.reduce(mine, "sum")
        return total.item()

    def _made(self) -> list[tuple[list[int], int]]:
        """The replies as tokens, made before the first step, and again after a resume."""
        found: list = [None]
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            found[0] = _replies(
                model if self.keeps.base is None else self.keeps.base,
                getattr(self.processing_class, "tokenizer", self.processing_class),
                self.keeps,
                self.args.seed,
            )
        broadcast_object_list(found)
        longest = getattr(self.args, "max_length", None) or 10**6
        rows = [((r.prompt_ids + r.reply_ids)[:longest], len(r.prompt_ids)) for r in found[0]]
        rows = [(whole, asked) for whole, asked in rows if 0 < asked < len(whole)]
        if not rows:
            raise InputError("retention: no reply of the base fits into max_length; raise it")
        return rows

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, **{k: sum(v) / len(v) for k, v in self._noted.items()}}
            self._noted.clear()
        return super().log(logs, *args, **kwargs)


def around(trainer: type, settings: Settings, stage: str, replies: Sequence[Reply]) -> type:
    """`trainer` with the rule that the settings have for a stage, or as it is.

    Raises InputError where there is a rule and no reply of the base: nothing would be kept.
    """
    section = settings.retention
    if section.rule == "none" or stage not in section.stages:
        return trainer
    if not replies:
        raise InputError(
            f"{stage}: retention.rule={section.rule} keeps the base's replies and got none: pass "
            "them (bbkit.data.broad.of_run), or set retention.rule=none"
        )
    names = ("rule", "weight", "budget", "recovery", "per_step")
    return keeping(trainer, replies, **{name: getattr(section, name) for name in names})
