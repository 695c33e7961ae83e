"""What of capability-aware GRPO goes into a checkpoint, so that a resumed run has the same weights.

Serves the claim of a dynamic reward: its weights are moved from where they were.
"""

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class Balance(TrainerCallback, ExportableState):
    """Keeps the weights of the rewards in each checkpoint's trainer_state.json, to go on from."""

    def __init__(self, trainer):
        self.trainer = trainer

    def state(self) -> dict:
        seen = {"controller": self.trainer.controller.state(), "gramian": self.trainer.gramian}
        return {"args": {}, "attributes": seen}

    def restore(self, state: dict) -> None:
        """Go on from a `state`; so too where a step was broken off after its weights had moved."""
        trainer = self.trainer
        trainer.micro_batches = []
        trainer.capture.clear()
        if trainer.limits is not None:
            trainer.limits.rows.clear()
        trainer.controller.restore(state["attributes"]["controller"])
        trainer.gramian = state["attributes"]["gramian"]

    def on_train_begin(self, args, state, control, **_):
        self.restore(state.stateful_callbacks.get("Balance", self.state()))
