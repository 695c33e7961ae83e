"""What of capability-aware GRPO goes into a checkpoint, so that a resumed run has the same weights.

Serves the claim of a dynamic reward: its weights are moved from where they were.
"""

from transformers import TrainerCallback

# The name of no callback: one that transformers knows by name it builds anew, without the trainer.
NAME = "capability weights"


class Balance(TrainerCallback):
    """Keeps the weights of the rewards in each checkpoint's trainer_state.json, to go on from."""

    def __init__(self, trainer):
        self.trainer = trainer

    def state(self) -> dict:
        return {"controller": self.trainer.controller.state(), "gramian": self.trainer.gramian}

    def restore(self, state: dict) -> None:
        """Go on from a `state`; so too where a step was broken off after its weights had moved."""
        trainer = self.trainer
        trainer.micro_batches = []
        trainer.capture.clear()
        if trainer.limits is not None:
            trainer.limits.rows.clear()
        trainer.controller.restore(state["controller"])
        trainer.gramian = state["gramian"]

    def on_train_begin(self, args, state, control, **_):
        self.restore(state.stateful_callbacks.get(NAME, self.state()))

    def on_step_end(self, args, state, control, **_):
        state.stateful_callbacks[NAME] = self.state()
