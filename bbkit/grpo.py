"""GRPO with the three rewards on TRL's GRPOTrainer.

Serves the claim on Capability-Aware GRPO (no value network). Prompts come in an order fixed by the
seed, each step with its share of general instructions, which carry the format reward alone; the
other rewards are None there. Raw rewards and their in-group spread are logged unweighted.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from bbkit import prompts, rewards
from bbkit.config import Settings
from bbkit.prompts import Example
from bbkit.sft import arguments, precision

CAPABILITIES = tuple(rewards.REWARDS)


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
    streams = (endless(questions), endless(instructions))
    order = []
    for _ in range(steps):
        step = [next(streams[0]) for _ in range(groups - general)]
        step += [next(streams[1]) for _ in range(general)]
        rng.shuffle(step)
        order += step
    return order


def reward_functions(examples: Sequence[Example]) -> list:
    """One TRL reward function per capability; rows name their example by the column `index`."""

    def named(capability: str, score):
        def reward(completions, index, **_):
            texts = [c[0]["content"] for c in completions]
            return [score(examples[i], text) for i, text in zip(index, texts, strict=True)]

        reward.__name__ = capability
        return reward

    return [named(k, score) for k, score in rewards.REWARDS.items()]


def build(
    model, tokenizer, order: Sequence[Example], settings: Settings, folder: Path, callbacks=()
):
    """A GRPOTrainer over `order` (see `schedule`) for a model that carries its LoRA matrices.

    The trainer's class is made here, after the import of trl: unsloth replaces that class when it
    is imported, and a subclass made before would bypass it.
    """
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from bbkit.adapters import keep_float32

    class Trainer(GRPOTrainer):
        """TRL's trainer that also logs each reward's in-group spread and the unparsed share."""

        def _calculate_rewards(self, inputs, prompts_, completions, completion_ids_list):
            matrix = super()._calculate_rewards(inputs, prompts_, completions, completion_ids_list)
            grouped = matrix.view(-1, self.num_generations, matrix.shape[1])
            spread = grouped.std(dim=1, correction=0)  # (groups, K); NaN where not applicable
            for k, name in enumerate(CAPABILITIES):
                known = spread[:, k][~torch.isnan(spread[:, k])]
                self._log_metric(f"sigma/{name}", known.mean().item() if len(known) else 0.0)
                self._log_metric(f"weight/{name}", float(self.reward_weights[k]))
            asked = [
                (order[x["index"]], c[0]["content"])
                for x, c in zip(inputs, completions, strict=True)
                if order[x["index"]].task != "instruction"
            ]
            missed = sum(rewards.answer_given(e, text) is None for e, text in asked)
            self._log_metric("unparsed", missed / max(1, len(asked)))
            self.last_samples = [
                {
                    "prompt": order[x["index"]].question,
                    "reply": c[0]["content"],
                    "rewards": dict(zip(CAPABILITIES, row, strict=True)),
                }
                for x, c, row in zip(inputs, completions, matrix.tolist(), strict=False)
            ]
            return matrix

    section = settings.grpo
    completions = section.prompts * section.generations
    passes = completions // section.micro_batch_size
    config = GRPOConfig(
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
        loss_type=section.loss_type,
        scale_rewards=section.scale_rewards,
        multi_objective_aggregation=section.aggregation,
        reward_weights=[getattr(section.weights, k) for k in CAPABILITIES],
        mask_truncated_completions=section.mask_truncated,
        shuffle_dataset=False,  # `order` is the order
        use_vllm=False,
        log_completions=False,
    )
    dataset = Dataset.from_list(
        [{"prompt": prompts.messages(e), "index": i} for i, e in enumerate(order)]
    )
    with keep_float32(model):
        return Trainer(
            model=model,
            reward_funcs=reward_functions(order),
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
