"""A model beside its own base, the adapter off: where that is not what it was, and without noise.

Serves the claim of no alignment tax: bbkit.retention compares the two.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from bbkit import InputError


def refuse_changed_base(model) -> None:
    """InputError where the model with its adapter off is not what it was before training."""
    mend = "pass keeping(..., base=a frozen copy)"
    for config in getattr(model, "peft_config", {}).values():
        start = getattr(config, "init_lora_weights", None)
        if str(start).lower().startswith(("pissa", "olora", "corda", "loftq")):
            said = f"init_lora_weights={start!r} changes the base's own weights"
            raise InputError(f"retention: {said}; {mend}")
    if not hasattr(model, "disable_adapter"):
        return  # refused elsewhere
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    with model.disable_adapter():  # what it switches off does not train within
        own = [n for n, p in trained if p.requires_grad and not n.startswith("prompt_encoder")]
    if own:
        said = f"{own[0]} trains and is no adapter's, so that it cannot be switched off"
        raise InputError(f"retention: {said}; {mend}")


@contextmanager
def without_dropout(model) -> Iterator[None]:
    """Dropout and NEFTune's noise would part a model from itself: all is in eval mode, but for what
    checkpoints activations, which it does in training alone."""
    running = (m for m in model.modules() if m.training)
    modules = [m for m in running if not getattr(m, "gradient_checkpointing", False)]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
