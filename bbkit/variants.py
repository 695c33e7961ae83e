"""Ways to a gradient per capability, timed apart: what `bbkit.benchmark` compares.

Each takes a model, token ids (sequences, tokens) and the weight of every sequence in every
capability (sequences, capabilities), and returns the seconds of its forward and of its backward
passes. `plain` is what TRL does, one gradient in all; `one_pass` is ours (`bbkit.gradients`); the
others are what one would write without it, and TorchJD's autojac.
"""

import functools
from collections.abc import Callable
from typing import Any

from bbkit import gpu


def _terms(model, ids):
    import torch

    kept = ids.shape[1] // 2
    logits = model(input_ids=ids, logits_to_keep=kept + 1).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, -kept:], reduction="none"
    )
    return loss.mean(1)


def _timed(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> tuple[float, float]:
    start = gpu.now()
    out = forward()
    middle = gpu.now()
    backward(out)
    return middle - start, gpu.now() - middle


@functools.lru_cache(maxsize=1)
def _capture(model, capabilities: int):
    """One for all rounds, as the trainer keeps one for all steps: new memory costs page faults."""
    from bbkit import gradients

    return gradients.Capture(model, capabilities)


def _plain(model, ids, weights) -> tuple[float, float]:
    times = _timed(lambda: _terms(model, ids), lambda terms: terms.sum().backward())
    model.zero_grad()
    return times


def _one_pass(model, ids, weights) -> tuple[float, float]:
    from bbkit import gradients

    capture = _capture(model, weights.shape[1])
    with gradients.watch(model, capture):
        capture.next(weights)
        times = _timed(lambda: _terms(model, ids), lambda terms: terms.sum().backward())
    capture.gradients.sum()  # raises if a matrix was missed, whose cost would be left out
    capture.clear()
    model.zero_grad()
    return times


def _backward_per_capability(model, ids, weights) -> tuple[float, float]:
    capture = _capture(model, weights.shape[1])

    def backward(terms):
        for k, column in enumerate(weights.T):
            (column * terms).sum().backward(retain_graph=k < len(weights.T) - 1)
            capture.take(k)

    times = _timed(lambda: _terms(model, ids), backward)
    capture.clear()
    return times


def _replay(model, ids, weights) -> tuple[float, float]:
    capture = _capture(model, weights.shape[1])
    forward = backward = 0.0
    for k in range(weights.shape[1]):

        def loss_backward(terms, column=weights[:, k]):
            (column * terms).sum().backward()

        times = _timed(lambda: _terms(model, ids), loss_backward)
        capture.take(k)
        forward, backward = forward + times[0], backward + times[1]
    capture.clear()
    return forward, backward


def _autojac(model, ids, weights) -> tuple[float, float]:
    from torchjd import autojac

    trainable = [p for p in model.parameters() if p.requires_grad]
    times = _timed(
        lambda: weights.T @ _terms(model, ids),
        lambda losses: autojac.backward(losses, inputs=trainable, parallel_chunk_size=1),
    )
    for p in trainable:
        del p.jac
    return times


VARIANTS = {
    "plain": _plain,
    "one_pass": _one_pass,
    "backward_per_capability": _backward_per_capability,
    "replay": _replay,
    "autojac": _autojac,
}
