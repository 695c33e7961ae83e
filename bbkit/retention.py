"""Retention: a gradient that keeps the base model's own replies likely, as a constraint.

Serves the claim of no alignment tax: three orthogonal rewards say nothing about what none of them
measures. Anchors are greedy replies of the base model to general instructions of the training
split, made once and kept in the run folder: no new data, no test data. The step may not raise their
loss to first order (A-GEM's constraint, arXiv 1812.00420, here one more row of the Gramian).
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bbkit import files, generation, gradients, prompts
from bbkit.prompts import Example

ANCHORS = 64  # replies of the base to draw from


def anchors(
    path: Path,
    model,
    tokenizer,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_tokens: int,
) -> list[tuple[Example, str]]:
    """64 of the `examples`, any 64, with the base model's replies.

    These are read from `path` if they have been made before. `model` is the base, without adapter.
    """
    places = random.Random(0).sample(range(len(examples)), min(ANCHORS, len(examples)))
    chosen = [examples[i] for i in sorted(places)]
    if not path.is_file():
        replies = generation.generate(model, tokenizer, chosen, max_new_tokens, batch_tokens)
        lines = (
            json.dumps({"id": e.id, "reply": r}, ensure_ascii=False) + "\n"
            for e, r in zip(chosen, replies, strict=True)
        )
        files.write_bytes(path, "".join(lines).encode())
    kept = {row["id"]: row["reply"] for row in files.read_rows(path)}
    return [(e, kept[e.id]) for e in chosen]


def loss(
    tokenizer, anchored: Sequence[tuple[Example, str]], size: int, max_length: int, seed: int
) -> Callable[[Any, int], Tensor]:
    """A function (model, step) -> mean negative log-likelihood of `size` anchor replies.

    Which ones follows from the seed and the step, so that a resumed run sees the same.
    """
    rows = []
    for example, reply in anchored:
        whole, asked = prompts.encode(tokenizer, example, reply)
        whole = whole[:max_length]
        rows.append((whole, ([-100] * asked + whole[asked:])[: len(whole)]))
    size = min(size, len(rows))

    def anchor_loss(model, step: int) -> Tensor:
        chosen = random.Random(f"anchors/{seed}/{step}").sample(rows, size)
        width = max(len(ids) for ids, _ in chosen)
        fill = tokenizer.pad_token_id
        ids = torch.tensor([i + [fill] * (width - len(i)) for i, _ in chosen])
        labels = torch.tensor([t + [-100] * (width - len(t)) for _, t in chosen])
        mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in chosen])
        here = next(model.parameters()).device
        return model(
            input_ids=ids.to(here), attention_mask=mask.to(here), labels=labels.to(here)
        ).loss

    return anchor_loss


def retaining(base: Any, retention: Callable[[Any, int], Tensor]) -> type:
    """A subclass of an SFTTrainer whose steps do not raise `retention(model, step)`.

    One more backward pass per step. Logs `cosine/sft/retention` and `coefficient/retention`.
    """

    class Retaining(base):
        """SFT with the anchors' gradient as a constraint; see bbkit.retention.retaining."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.capture = gradients.Capture(self.model, 2)

        def training_step(self, model, inputs, num_items_in_batch=None):
            value = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self.capture.take(0)
                with self.compute_loss_context_manager():
                    kept = retention(
                        self.accelerator.unwrap_model(self.model), self.state.global_step
                    )
                self.accelerator.backward(kept)
                self.capture.take(1)
                rows = self.capture.gradients
                if self.accelerator.num_processes > 1:
                    rows.copy_(self.accelerator.reduce(rows, "mean"))
                gramian = self.capture.gramian
                found = gradients.combine(gramian, "dual_cone", [1.0, 0.0])
                self.capture.put(found)
                self.capture.clear()
                metrics = self._metrics["train"]
                cosine = gradients.cosines(gramian)[0, 1]
                metrics["cosine/sft/retention"].append(cosine.item())
                metrics["coefficient/retention"].append(found[1].item())
                metrics["retention_loss"].append(kept.item())
            return value

    return Retaining
