"""The kit's GRPO run: capability-aware GRPO with the rewards asked for on its own prompts.

Serves the claim on Capability-Aware GRPO (no value network). Prompts come in an order fixed by the
seed, each step with its share of general instructions, which carry the format reward alone; the
other rewards are None there. The trainer itself is bbkit.capability.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bbkit import prompts, rewards
from bbkit.config import Settings
from bbkit.data.replies import Reply
from bbkit.machine import judge, processes
from bbkit.machine.functions import names
from bbkit.prompts import Example
from bbkit.sft import arguments, precision

if TYPE_CHECKING:
    from trl import GRPOTrainer as Trainer
else:
    Trainer = object  # the class is put before TRL's, which unsloth replaces on import

# Of a micro-batch of TRL's, what has no column for each token.
BY_ROW = ("advantages", "capability_advantages", "num_items_in_batch")
Judge = Callable[[Sequence[Example], Sequence[str]], list]


def schedule(
    questions: Sequence[Example],
    instructions: Sequence[Example],
    steps: int,
    groups: int,
    share: float,
    seed: int,
) -> list[Example]:
    """The prompts of all steps in order: `groups` a step, of which `share` general instructions.

    Each source is gone through once, in a new random order, before any prompt comes again.

    >>> q = [Example(str(i), "short", "?") for i in range(3)]
    >>> g = [Example("i", "instruction", "!")]
    >>> [e.id for e in schedule(q, g, steps=2, groups=2, share=0.5, seed=0)].count("i")
    2
    """
    rng = random.Random(f"schedule/{seed}")

    def endless(rows: Sequence[Example]):
        while True:
            yield from rng.sample(list(rows), len(rows))

    general = round(groups * share) if instructions else 0
    general = groups if not questions else general
    asked, told = endless(questions), endless(instructions)
    order = []
    for _ in range(steps):
        step = [*islice(asked, groups - general), *islice(told, general)]
        rng.shuffle(step)
        order += step
    return order


def reward_functions(
    examples: Sequence[Example],
    by_model: Judge | None = None,
    share: float = 0.0,
    chosen: Mapping[str, rewards.Reward] = rewards.REWARDS,
) -> list:
    """One TRL reward function per capability; rows name their example by the column `index`.

    Of the reasoning reward, `share` is what `by_model` gives and the rest what the rules give.
    """

    def named(capability: str, score):
        def reward(completions, index, **_):
            asked, texts = [examples[i] for i in index], [c[0]["content"] for c in completions]
            found = [score(example, text) for example, text in zip(asked, texts, strict=True)]
            if capability == "reasoning" and by_model:
                pairs = zip(found, by_model(asked, texts), strict=True)
                return [r if r is None else (1 - share) * r + share * j for r, j in pairs]
            return found

        reward.__name__ = capability
        return reward

    return [named(k, score) for k, score in chosen.items()]


def by_length(batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """TRL's micro-batches of one step with their rows sorted by length, each cut to its longest.

    TRL pads all to the longest of the step. The step's sums are the same in another order, except
    where a model counts padding as places (GPT-2). The `entropy` that TRL logs, a mean of means of
    micro-batches, is another where it goes with length. With other columns (images, tools, the KL
    penalty's log-probabilities) all stays as it is.

    >>> ids = torch.tensor([[0, 5, 6], [4, 5, 6]])
    >>> one = {"prompt_ids": ids, "prompt_mask": ids.sign(), "completion_ids": ids.fliplr()}
    >>> one |= {"completion_mask": ids.fliplr().sign(), "advantages": torch.ones(2)}
    >>> [b["prompt_ids"].shape[1] for b in by_length([{k: v[i:i + 1] for k, v in one.items()}
    ...                                               for i in (1, 0)])]
    [2, 3]
    """
    asked, replied = ("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask")
    if batches[0].keys() - {*asked, *replied, *BY_ROW}:
        return [dict(b) for b in batches]
    rows = {k: torch.cat([b[k] for b in batches]) if v.ndim else v for k, v in batches[0].items()}
    lengths = rows["prompt_mask"].sum(1) + rows["completion_mask"].sum(1)
    found = []
    for chosen in lengths.argsort(stable=True).chunk(len(batches)):
        some = {k: v[chosen] if v.ndim else v for k, v in rows.items()}
        first = int(some["prompt_mask"].sum(1).max())
        last = max(1, int(some["completion_mask"].sum(1).max()))  # all masked: one stays
        some |= {k: some[k][:, -first:] for k in asked}
        found.append(some | {k: some[k][:, :last] for k in replied})
    return found


class Sampling(Trainer):
    """A GRPOTrainer that pads less, logs the unparsed share, and keeps samples for the run folder.

    With `sample_at_once`, each part of the completions has random numbers of its own, from
    seed, step and place, so that two processes draw what one would. `build` puts it before TRL's.
    """

    order: Sequence[Example]
    sample_at_once: int

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Of the KL penalty's two adapters transformers would load TRL's frozen copy alone."""
        from bbkit.models import load_adapter

        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_adapter(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def _prepare_inputs(self, generation_batch):
        held = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        own = self.loss_type == "bnpo" or self.aux_loss_enabled  # means over a micro-batch
        if self._buffered_inputs is held or own:
            return inputs
        self._buffered_inputs = by_length(self._buffered_inputs)
        return self._buffered_inputs[self._step % len(self._buffered_inputs)]

    def _generate_single_turn(self, prompt_ids, *rest):
        if not (size := self.sample_at_once):
            return super()._generate_single_turn(prompt_ids, *rest)
        first, found = self.accelerator.process_index * len(prompt_ids), []
        for start in range(0, len(prompt_ids), size):
            name = f"sample/{self.args.seed}/{self.state.global_step}/{first + start}"
            with torch.random.fork_rng():
                torch.manual_seed(random.Random(name).getrandbits(63))
                some, _ = super()._generate_single_turn(prompt_ids[start : start + size], *rest)
            found += some
        return found, None

    def _calculate_rewards(self, inputs, prompts_, completions, completion_ids_list):
        matrix = super()._calculate_rewards(inputs, prompts_, completions, completion_ids_list)
        asked = [self.order[x["index"]] for x in inputs]
        pairs = [(e, c[0]["content"]) for e, c in zip(asked, completions, strict=True)]
        given = [rewards.answer_given(e, text) for e, text in pairs if e.task != "instruction"]
        counts = torch.tensor([given.count(None), len(given)], device=self.accelerator.device)
        missed, count = self.accelerator.reduce(counts).tolist()
        self._log_metric("unparsed", missed / max(1, count))
        named = [dict(zip(self.reward_func_names, row, strict=True)) for row in matrix.tolist()]
        self.last_samples = [
            {"prompt": e.question, "reply": text, "rewards": scores}
            for (e, text), scores in zip(pairs, named, strict=False)
        ]
        return matrix


def configuration(model, settings: Settings, folder: Path):
    """TRL's GRPOConfig for the settings of a run, with every field that unsloth would change."""
    from trl import GRPOConfig

    section = settings.grpo
    completions = section.prompts * section.generations
    passes = processes.share(completions, section.micro_batch_size, "grpo")
    # unsloth's: into how many parts it takes a micro-batch, which one pass reads whole
    own: dict[str, Any] = {k: 1 for k in ("unsloth_grpo_mini_batch",) if hasattr(GRPOConfig, k)}
    return GRPOConfig(
        **arguments(section, settings, folder),
        **precision(model),
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        num_iterations=section.updates_per_generation,
        num_generations=section.generations,
        max_completion_length=section.max_completion_length,
        temperature=section.temperature,
        top_p=section.top_p,
        beta=section.beta,
        epsilon=section.epsilon,
        epsilon_high=section.epsilon,  # unsloth would make it 0.28 with dapo
        loss_type=section.loss_type,
        scale_rewards="none",  # the advantages are capability_aware's
        reward_weights=[section.weights.get(k, 1.0) for k in names(section.rewards)],
        mask_truncated_completions=section.mask_truncated,
        shuffle_dataset=False,  # `order` is the order
        **own,
    )


def build(
    model, tokenizer, order: Sequence[Example], settings: Settings, folder: Path, callbacks=(),
    replies: Sequence[Reply] = (), chosen: Mapping[str, rewards.Reward] | None = None,
):  # fmt: skip
    """A capability-aware GRPOTrainer over `order` (see `schedule`) for a model with its LoRA on.

    `replies` are those of the base, which retention keeps; `chosen` are the rewards, by default
    read from where `grpo.rewards` says (bbkit.rewards.chosen).
    """
    from datasets import Dataset
    from trl import GRPOTrainer

    from bbkit import retention
    from bbkit.capability import capability_aware
    from bbkit.models import keep_float32

    section = settings.grpo
    chosen = chosen or rewards.chosen(section.rewards)
    dataset = Dataset.from_list(
        [{"prompt": prompts.messages(e), "index": i} for i, e in enumerate(order)]
    )
    own = {"order": order, "sample_at_once": section.sample_at_once}
    aware = capability_aware(
        type("Sampling", (Sampling, GRPOTrainer), own),
        advantages=section.advantages,
        sigma_floor=section.sigma_floor,
        combination=section.combination,
        metric=section.metric,
        controller=section.controller.rule,
        **{k: getattr(section.controller, k) for k in ("rate", "ema", "target", "floor")},
    )
    trainer = retention.around(aware, settings, "grpo", replies)
    base_judges = partial(judge.judged, model, tokenizer) if section.judge else None
    with keep_float32(model):
        return trainer(
            model=model,
            reward_funcs=reward_functions(order, base_judges, section.judge, chosen),
            args=configuration(model, settings, folder),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
